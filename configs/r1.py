"""DeepSeek-R1 (2501.12948) end to end, for Qwen2.5 bases: R1-Zero, cold start, two stages of RL, distillation.

Command:  python -m rl_reasoning.pipeline --config=configs/r1.py:base=QWEN,data=DATA,general=GENERAL --workdir=runs/r1 [--plan]
Hardware: an accelerator pod; `fsdp` is over how many devices the weights lie. Not run by us: `--plan` checks and prints it.

QWEN is the folder of a base (Qwen2.5-32B), GENERAL a file or folder of demonstrations for all that is no reasoning (writing, questions of
fact, translation, ...; `prompt` + `completion`, or `messages`), and DATA holds folders with train* and test* files (data.task dataset):
  math, code, stem, logic   `prompt` + `answer`, of code `prompt` + `tests`: rewarded by rules
  helpful, safe             `prompt`: rewarded by the reward model of that name
  helpful_pairs             `prompt` + `chosen` + `rejected`
  safe_labels               `prompt` + `completion` + `label`, 1 where it is safe
`cold_start=FILE` takes the place of the first three stages. `student=FOLDER` (and `student2`) adds its distillation and, for comparison,
RL on it. A smaller base and `scale=0.01`, which divides numbers of updates, samples and rows, make a rehearsal of it.

Numbers. P: of the paper, sections 2 and 3. S: of its supplement, not compared with the text again: check them before you quote them.
What has no mark is ours. The paper's step is an update here: 32 questions x 16 outputs; a rollout is 16 of them.
Stages                    the paper's
  r1_zero, r1_zero_long   R1-Zero; completions twice as long for the last fifth
  cold_sampled, cold      the cold-start set; the paper also had it rewritten, and read by people: here it is filtered
  sft1, rl1               Dev1, Dev2: SFT of the base, reasoning RL with the language reward
  sampled ... sft2        rejection sampling, joined with general data; SFT of the base: Dev3
  rm_helpful, rm_safe     the reward models, from sft2
  rl2, rl2_general        R1: the second RL stage; general prompts and preference rewards in its last 400 updates only
"""

REASONING = ('math', 'code', 'stem', 'logic')
GENERAL = ('helpful', 'safe')
PROMPTS = {'math': 26, 'code': 17, 'stem': 22, 'logic': 15, 'helpful': 66, 'safe': 12}  # S: thousands, as weights of the mixture


def get_config(
  base: str = '', data: str = '', general: str = '', cold_start: str = '', student: str = '', student_rate: float = 1e-4,
  student2: str = '', student2_rate: float = 8e-5, fsdp: int = 1, micro_batch: int = 64, language: str = 'en', seed: int = 0,
  scale: float = 1.0,
) -> dict:  # fmt: skip
  for name, value in (('base', base), ('data', data), ('general', general)):
    assert value, f'{name}= is missing'

  # student_rate, S: 1e-4 for Qwen2.5-Math-1.5B, 8e-5 Qwen2.5-Math-7B, 7e-5 Qwen2.5-14B, 6e-5 Qwen2.5-32B.
  def scaled(count: float) -> int:
    return max(1, round(count * scale))

  prompt_limit, limit = 2048, 32_768  # the second is P, of the first RL stage
  shared = {'seed': seed, 'model': {'dtype': 'bfloat16'}, 'mesh': {'fsdp': fsdp}}
  training = {'checkpoint': {'every': 10, 'keep': 2}, 'model': {'dtype': 'bfloat16', 'remat': 'full'}}
  rules = {'functions': ('accuracy', 'format'), 'weights': (1.0, 1.0)}  # P: equal weights
  consistent = {
    'functions': ('accuracy', 'format', 'language'),  # P: the language reward is added directly
    'weights': (1.0, 1.0, 1.0),
    'options': {'language': {'language': language}},
  }

  def tasks(*names: str) -> dict:
    return {name: {'task': 'dataset', 'path': f'{data}/{name}', 'weight': float(PROMPTS[name])} for name in names}

  def rl(
    init: str, updates: float, rewards: dict, temperature: float = 1.0, length: int = limit, general: bool = False, **role
  ) -> dict:
    names = REASONING + GENERAL if general else REASONING
    return {
      **shared,
      **training,
      'total_steps': scaled(updates / 16),
      'roles': {'policy': {'init': init, **role}},
      'data': {
        'mixture': tasks(*names),
        'batch_size': 32 * 16,
        'max_prompt_length': prompt_limit,
      },  # P: 32 questions an update, 16 updates
      'objective': {
        'name': 'r1',  # P: clip 10, KL 0.001
        'num_generations': 16,  # P
        'num_minibatches': 16,  # P: 8,192 outputs in 16 minibatches, one inner epoch
        'ref_model_sync_updates': 400,  # P
      },
      'rollout': {'temperature': temperature, 'max_completion_length': length, 'chunk': 1024},
      'rewards': rewards,
      'optim': {'learning_rate': 3e-6, 'micro_batch': micro_batch},  # P
      'eval': {'every': scaled(25), **evaluation},
    }

  evaluation = {  # P: temperature 0.6, top-p 0.95, several samples a problem
    'size': 400,
    'batch_size': 64,
    'evaluators': {name: {**task, 'num_samples': 4, 'temperature': 0.6, 'top_p': 0.95} for name, task in (
      (name, {'task': 'dataset', 'path': f'{data}/{name}'}) for name in REASONING)},
  }  # fmt: skip

  def sft(init: str, rows: str, count: float, batch_size: int, learning_rate: float) -> dict:
    """Two epochs of `count` rows (S: 2 to 3), of which nine in ten are trained on: the others are the test split of the file."""
    return {
      **shared,
      **training,
      'total_steps': scaled(2 * 0.9 * count / batch_size),
      'roles': {'policy': {'init': init, 'template': 'chat'}},
      'data': {
        'task': 'dataset',
        'path': rows,
        'batch_size': batch_size,
        'max_length': prompt_limit + limit,  # S: a context of 32,768
        'max_prompt_length': prompt_limit,
      },
      'objective': {'name': 'sft'},
      'rollout': {'max_completion_length': limit, 'chunk': 1024},
      'optim': {
        'learning_rate': learning_rate,
        'schedule': 'cosine',
        'micro_batch': micro_batch,
      },  # S: cosine, but to a tenth, not to zero
      'eval': {'every': scaled(2 * 0.9 * count / batch_size), 'at_start': False, **evaluation},
      'checkpoint': {'every': 200, 'keep': 1},
    }

  def sample(init: str, size: int, samples: int, temperature: float, most: int, **role) -> dict:
    return {
      **shared,
      'roles': {'policy': {'init': init, **role}},
      'data': {'mixture': tasks(*REASONING), 'max_prompt_length': prompt_limit},
      'rollout': {'max_completion_length': limit, 'chunk': 1024},
      'rewards': rules,
      'generate': {
        'keep': 'correct', 'size': size, 'num_samples': samples, 'temperature': temperature, 'max_per_prompt': most, 'batch_size': 64,
        'seed': seed,
      },
    }  # fmt: skip

  def reward_model(name: str, objective: dict, pairs: int) -> dict:
    return {
      **shared,
      **training,
      'total_steps': scaled(pairs / 256),  # P: one epoch, batches of 256
      'roles': {'policy': {'init': '{workdir}/sft2'}},
      'data': {
        'task': 'preference',
        'path': f'{data}/{name}',
        'batch_size': 256,
        'max_length': 8192,
        'overlong': 'truncate_prompt',
      },  # P
      'objective': objective,
      'optim': {'learning_rate': 6e-6, 'micro_batch': micro_batch},  # P
    }

  readable = (  # P: correct and readable; no mixed languages, long paragraphs or code blocks in the chain of thought
    {'name': 'format'},
    {'name': 'language', 'language': language, 'least': 0.95},
    {'name': 'repetition', 'ngram_size': 20, 'most': 0.2},
    {'name': 'paragraphs', 'max_characters': 4000},
    {'name': 'code_blocks'},
    {'name': 'duplicates'},
  )
  stages: dict = {}
  if not cold_start:
    stages['r1_zero'] = rl(base, 8200, rules, template='r1_zero')  # S: 10,400 updates in all; the limit is raised at 8,200
    stages['r1_zero_long'] = rl('{workdir}/r1_zero', 2200, rules, length=2 * limit)
    stages['cold_sampled'] = sample('{workdir}/r1_zero_long', scaled(8000), 8, 1.0, 4)  # P: thousands of prompts, temperature 1
    stages['cold'] = {
      'filter': {
        'inputs': {'r1_zero': '{workdir}/cold_sampled/data.jsonl'},
        'steps': (*readable, {'name': 'per_prompt', 'most': 1}),
      }
    }
    cold_start = '{workdir}/cold/data.jsonl'
  stages['sft1'] = sft(base, cold_start, 5000, 128, 5e-5)  # S: batches of 128, 5e-5
  stages['rl1'] = rl('{workdir}/sft1', 4000, consistent)  # the number of updates is ours
  # P: several responses a prompt, correct ones kept, about 600,000 rows; and 200,000 that are no reasoning.
  stages['sampled'] = sample('{workdir}/rl1', 0 if scale == 1 else scaled(80_000), 32, 1.0, 16)
  stages['reasoning'] = {'filter': {'inputs': {'rl1': '{workdir}/sampled/data.jsonl'}, 'steps': readable}}
  stages['sft2_data'] = {
    'filter': {
      'inputs': {'reasoning': '{workdir}/reasoning/data.jsonl', 'general': general},
      'steps': ({'name': 'duplicates'},),
      'sizes': {'reasoning': scaled(600_000), 'general': scaled(200_000)},
      'seed': seed,
    }
  }
  rows = '{workdir}/sft2_data/data.jsonl'
  stages['sft2'] = sft(base, rows, 800_000, 128, 5e-5)
  stages['rm_helpful'] = reward_model('helpful_pairs', {'name': 'reward_model'}, 66_000)  # P
  stages['rm_safe'] = reward_model('safe_labels', {'name': 'outcome_reward_model'}, 106_000)  # P
  stages['rl2'] = rl('{workdir}/sft2', 1300, consistent, temperature=0.7)  # P: 1,700 updates in all, temperature 0.7
  preferred = {  # P: a reward model where the prompt is general, by the set that it is of; format and language everywhere
    'functions': ('accuracy', 'format', 'language', 'helpful', 'safe'),
    'weights': (1.0, 1.0, 1.0, 1.0, 1.0),
    'options': {'language': {'language': language}},
    'only': {'accuracy': REASONING, 'helpful': ('helpful',), 'safe': ('safe',)},
  }
  stages['rl2_general'] = rl('{workdir}/rl2', 400, preferred, temperature=0.7, general=True)
  stages['rl2_general']['roles']['reward'] = {
    'helpful': {'init': '{workdir}/rm_helpful', 'reads': 'answer'},  # P: the final answer only
    'safe': {'init': '{workdir}/rm_safe', 'reads': 'whole'},  # P: the chain of thought too
  }
  stages['r1'] = {'export': {'checkpoint': '{workdir}/rl2_general'}}
  for name, folder, rate in (('student', student, student_rate), ('student2', student2, student2_rate)):
    if folder:
      stages[f'{name}_distilled'] = sft(folder, rows, 800_000, 64, rate)  # S: batches of 64
      stages[f'{name}_rl'] = rl(folder, 10_000, rules, template='r1_zero')  # P: RL of the student itself, over 10,000 updates
      stages[f'{name}_exported'] = {'export': {'checkpoint': f'{{workdir}}/{name}_distilled'}}
  return {'stages': stages}
