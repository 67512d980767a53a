"""What rule rewards measure of texts: language, steps, repetition. Standard library only, linear in the text however hostile it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

TAG = re.compile('</?(?:think|answer)>')


def chain_of_thought(text: str) -> str:
  """All that stands before the last </think>, or, in a text that is still thinking, all of it; without thinking ''. Tags left out.

  The LAST, as for the answer (verify.math.extract_answer): '<think>decoy</think> the real chain </think>' is judged whole.
  """
  head, closed, _ = text.rpartition('</think>')
  return TAG.sub(' ', head if closed else text if '<think>' in text else '')


# Language.

SCRIPTS = {  # letters and the marks that are written on them; no digits, no punctuation
  'latin': 'A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua787\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a',
  'greek': '\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u03ff\u1f00-\u1fff',
  'cyrillic': '\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f',
  'arabic': '\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc',
  'hebrew': '\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u05d0-\u05f2\ufb1d-\ufb4f',
  'devanagari': '\u0900-\u0963\u0971-\u097f\ua8e0-\ua8ff',
  'thai': '\u0e01-\u0e3a\u0e40-\u0e4e',
  'hangul': '\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb',
  'kana': '\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f',
  'han': '\u3005\u3007\u2e80-\u2fd5\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f',
}  # fmt: skip
RUN = re.compile('|'.join(f'(?P<{name}>[{letters}]+)' for name, letters in SCRIPTS.items()) + r'|(?P<other>[^\W\d_])')
LANGUAGES = {
  **dict.fromkeys(['en', 'de', 'fr', 'es', 'it', 'pt', 'nl', 'sv', 'pl', 'cs', 'tr', 'vi', 'id'], 'latin'),
  'zh': 'han', 'ja': 'kana', 'ko': 'hangul', 'ru': 'cyrillic', 'ar': 'arabic', 'hi': 'devanagari', 'el': 'greek', 'he': 'hebrew',
  'th': 'thai',
}  # fmt: skip
KANJI_PER_KANA = 3  # Han letters beyond this many a kana are Chinese, not Japanese

CODE_AND_MATHS = (('```', '```'), ('$$', '$$'), ('\\[', '\\]'), ('\\(', '\\)'), ('\\begin{', '\\end '))
INLINE = re.compile(r'`[^`\n]++`|\$(?=[^\s$])[^$\n]*+(?<=\S)\$(?!\d)')  # pandoc's rule for $: 'from $5 to $10' is no formula
END = re.compile(r'\\end\{[A-Za-z*]*\}')
COMMAND = re.compile(r'\\begin\{[A-Za-z*]*\}|\\[A-Za-z]+')
# Accents written apart, and mathematical letters and signs that Unicode counts as letters.
NO_LETTER = re.compile('[\u0300-\u036f\u2070-\u209f\u2100-\u218f\U0001d400-\U0001d7ff]+')
ASCII = re.compile('[\x00-\x7f]+')


def blank(text: str, start: str, end: str) -> str:
  """Text with the ASCII of every start...end taken out, for what has an end. Other letters stay: whoever thinks in another language inside
  a code fence or \\text{...} still does."""
  pieces, place = [], 0
  while (opened := text.find(start, place)) >= 0:
    closed = text.find(end, opened + len(start))
    if closed < 0:  # nor has any later one an end: without this break a text of start marks takes quadratic time
      break
    pieces += [text[place:opened], ASCII.sub(' ', text[opened:closed])]
    place = closed + len(end)
  return ' '.join([*pieces, text[place:]])


def prose(text: str) -> str:
  """A text without the names, keywords and commands of its code and LaTeX."""
  text = END.sub(r'\\end ', text)
  for start, end in CODE_AND_MATHS:
    text = blank(text, start, end)
  text = INLINE.sub(lambda span: ASCII.sub(' ', span[0]), text)
  return NO_LETTER.sub('', COMMAND.sub(' ', text))


def language_share(text: str, language: str) -> float:
  """Share of a text's letters that are of the language's script, 0 to 1; 0 where there are no letters. `language` is one of LANGUAGES.

  Runs of fewer than four Latin or Greek letters are skipped while there are longer ones or other scripts: variables, units and functions
  (x, cos, kg, pi) are of no language. All languages of one script are one: German passes as English. Japanese is kana, and Han letters
  in the proportion that Japanese has; Chinese is Han letters alone, so Japanese scores the share of its kanji in it.
  """
  counts, short = dict.fromkeys([*SCRIPTS, 'other'], 0), dict.fromkeys(['latin', 'greek'], 0)
  for run in RUN.finditer(prose(text)):
    script, letters = str(run.lastgroup), run.end() - run.start()
    (short if script in short and letters < 4 else counts)[script] += letters
  if not any(counts.values()):
    counts.update(short)
  script = LANGUAGES[language]
  right = counts[script] + (min(counts['han'], KANJI_PER_KANA * counts['kana']) if language == 'ja' else 0)
  return right / (sum(counts.values()) or 1)


def is_mixed(text: str) -> bool:
  """Whether a text is in several languages: no one of LANGUAGES has all of its letters. One without letters is in none."""
  return bool(RUN.search(prose(text))) and max(language_share(text, one) for one in LANGUAGES) < 1


# Steps.

STEP = re.compile(
  r'^[ \t>#*_]{0,8}(?:\d{1,3}[.)](?=\s)|[-*\u2022][ \t])'  # a list's item
  r'|\b(?:Step \d{1,3}\**[ \t]?[:.)]|(?:First|Firstly|Second|Secondly|Third|Thirdly|Next|Then|Finally|Lastly),)',
  re.MULTILINE,
)


def steps(text: str) -> Iterator[str]:
  """What follows each mark of a step ('Step 1:', '1.', '-', 'First,', ...) up to the next, letters and digits only, in lower case."""
  marks = list(STEP.finditer(text))
  ends = [mark.start() for mark in marks[1:]] + [len(text)]
  for mark, end in zip(marks, ends):
    yield ''.join(filter(str.isalnum, text[mark.end() : end].casefold()))


def count_steps(text: str) -> int:
  """Steps that say something (three letters or digits) that no other step says: bare marks and a step said again are none."""
  return len({step for step in steps(text) if len(step) >= 3})


# Repetition.


def repeated_share(tokens: Sequence[int], size: int) -> float:
  """1 - distinct / all of the n-grams of `size` tokens; 0 where there are none.

  By doubling: n-grams of 2k are pairs of numbered n-grams of k, so the time is that of log2(size) passes, and a huge size costs no memory.
  """
  if len(tokens) < size:
    return 0.0
  grams, width = list(tokens), 1
  while width < size:
    step = min(width, size - width)  # the last pair overlaps
    number: dict[tuple[int, int], int] = {}
    grams = [number.setdefault(pair, len(number)) for pair in zip(grams, grams[step:])]
    width += step
  return 1 - len(set(grams)) / len(grams)
