"""Answers of an endpoint a second: `python -m benchmarks.api_rate`, from the repository's root.

The server answers after 0.2 s, over real sockets, in a process of its own; one request in twenty is answered 429 or 500 first. The client's
best is concurrency / 0.2 s; what is missing is its own time, the file of answers, and the requests that failed.
"""

import multiprocessing
import pathlib
import tempfile
import time

from rl_reasoning.api import Answer, Client, Endpoint
from tests.test_api import Server, asked, chat, request

LATENCY = 0.2  # s


def serve(pipe) -> None:
  failed: set[str] = set()

  def reply(body, _):
    text = asked(body)
    time.sleep(LATENCY)
    if int(text) % 20 == 0 and text not in failed:
      failed.add(text)
      return (429 if int(text) % 40 else 500), {}
    return chat(text * 20)

  pipe.send(Server(reply).url)
  pipe.recv()


def main() -> None:
  for concurrency in (1, 8, 64):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(theirs,))
    process.start()
    endpoint = Endpoint(base_url=ours.recv(), model='m', concurrency=concurrency, backoff=0.1)
    count = 20 * concurrency
    with tempfile.TemporaryDirectory() as folder, Client(endpoint, pathlib.Path(folder) / 'answers') as client:
      start = time.perf_counter()
      answers = [outcome for _, outcome in client.complete(request(str(n)) for n in range(count))]
      seconds = time.perf_counter() - start
    assert len(answers) == count and all(isinstance(outcome, Answer) for outcome in answers)
    ours.send(None)
    process.join()
    rate, best = count / seconds, concurrency / LATENCY
    print(f'concurrency {concurrency}: {rate:.0f} answers a second, {rate / best:.0%} of {best:.0f}')


if __name__ == '__main__':
  main()
