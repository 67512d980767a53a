"""DeepSeek-R1 (2501.12948) end to end at nano scale: the stages of configs/r1.py on two CPU cores, from nothing.

Command:  make r1-nano     (python -m rl_reasoning.pipeline --config=configs/r1_nano.py:seed=0 --workdir=runs/r1_nano)
Table:    python -m launch.stages_report runs/r1_nano_0 runs/r1_nano_1 runs/r1_nano_2 --out=docs/results/r1_nano.json
            --metrics="greedy/accuracy,8 samples/accuracy,8 samples/pass@8,8 samples/maj@8,8 samples/format,8 samples/rewards/language,
            8 samples/rewards/mixed,8 samples/length,samples/rewards/gold_reviews,held out/accuracy"  (in one line)
            --compare=r1_zero_consistent_eval:r1_zero_eval,rl2_general_eval:r1_zero_eval,student_distilled_eval:student_rl_eval
Hardware: 2 CPU cores of an AMD EPYC. Duration: 25 min 33 s (make r1-nano from a fresh clone, set-up excluded).
Measured, seeds 0, 1, 2, greedy accuracy on 400 held-out problems (mean, half of the 95 % t-interval): base .481 (.032), r1_zero .82 (.15),
rl1 .866 (.073), rl2_general .914 (.035); students: distilled .63 (.20), clean .72 (.26), RL .153 (.037). All: docs/results/r1_nano.json.

The reasoning task is the demo's chained arithmetic, here written in two languages, told apart by the word that opens a step:
<think>then7+9=16;то16-3=13;then13-8=5</think><answer>5</answer>. The author of the base's data is careless, in English more so where he
adds and in Russian where he subtracts: either language alone is right in .57 of his chains, the better one for each step in .64. So it pays
to mix; he does, and answers a quarter of the problems at once. The general task is the reviews of configs/rlhf_nano.py.

  base                     SFT on the careless author and on reviews: what stands for the pretrained model
  r1_zero                  GRPO from the base on accuracy and format alone; the reference is replaced every `sync` updates
  r1_zero_consistent       the same with the language-consistency reward: what it does to mixing, and what it costs
  zero_, base_sampled      samples of r1_zero, and of the base where r1_zero hardly writes English any more
  cold                     of these what is right, readable and in English
  sft1, rl1                SFT of the base on it; GRPO with the language-consistency reward
  sampled, reasoning       rejection sampling from rl1
  rm_helpful, rm_safe      reward models of reviews: helpful from rankings, safe (nothing claimed that was not asked for) from labels
  general                  reviews: the best of 4 samples by rm_helpful
  sft2                     SFT of the base on both
  rl2, rl2_general         GRPO: rules; then rules on arithmetic and reward models on reviews
  student_base             a model of a quarter of the parameters, trained as the base
  student_distilled        its SFT on the data of sft2.   student_clean: on as many chains of an author without errors, as many
                           steps, all on sums
  student_rl               GRPO on it with the rewards of r1_zero; `seconds` of the report tell what either cost
  NAME_eval                held-out problems, the same for all;   NAME_reviews: gold reward of reviews, which no stage sees
"""

TASK = {'operands': 4, 'low': 3, 'high': 9}
AUTHOR = {
  'styles': {'direct': 0.25, 'sloppy': 0.75}, 'sloppiness': {'en': {'+': 0.65, '-': 0.2}, 'ru': {'+': 0.5, '-': 1.0}},
  'languages': {'en': 1.0, 'ru': 1.0}, 'mixing': 0.4,
}  # fmt: skip
STUDENT = {'hidden_size': 48, 'intermediate_size': 128, 'num_hidden_layers': 2}


def get_config(
  seed: int = 0, scale: float = 1.0, language_weight: float = 1.0, sync: int = 45, eval_size: int = 400, eval_seed: int = 2
) -> dict:
  def scaled(count: int) -> int:
    return max(2, round(count * scale))

  rollout = {'max_completion_length': 56}  # a clean chain has 45 tokens at most; with the prompt they fill 64
  rules = {'functions': ('accuracy', 'format'), 'weights': (1.0, 0.2)}
  consistent = {'functions': ('accuracy', 'format', 'language'), 'weights': (1.0, 0.2, language_weight)}
  measured = {'functions': (*consistent['functions'], 'mixed'), 'weights': (*consistent['weights'], 0.0)}
  sums = {'task': 'arithmetic', 'train_size': 20_000, 'options': TASK}
  reviews = {'task': 'reviews', 'train_size': 8000, 'options': {'rows': 'prompts'}}
  saved = {'checkpoint': {'every': 50, 'keep': 1}}

  def evaluation(stage: str) -> dict:
    return {
      'data': {'task': 'arithmetic', 'options': TASK, 'max_prompt_length': 16},
      'rollout': rollout,
      'rewards': measured,
      'eval': {
        'size': eval_size, 'batch_size': min(200, eval_size), 'seed': eval_seed,
        'evaluators': {'greedy': {}, '8 samples': {'num_samples': 8, 'temperature': 1.0}},
      },
      'evaluate': {'checkpoint': f'{{workdir}}/{stage}'},
    }  # fmt: skip

  def evaluation_of_reviews(stage: str) -> dict:
    return {
      'roles': {'reward': helpful | safe},
      'data': {'task': 'reviews', 'options': {'rows': 'prompts'}, 'max_prompt_length': 16},
      'rollout': rollout,
      'rewards': {'functions': ('gold_reviews', 'helpful', 'safe'), 'weights': (1.0, 0.0, 0.0)},
      'eval': {
        'size': eval_size // 4, 'batch_size': min(100, eval_size // 4), 'seed': eval_seed,
        'evaluators': {'samples': {'num_samples': 2, 'temperature': 1.0}},
      },
      'evaluate': {'checkpoint': f'{{workdir}}/{stage}'},
    }  # fmt: skip

  def sft(data: dict, steps: int, learning_rate: float = 1e-3, init: str = '{workdir}/base', **more) -> dict:
    return {
      'seed': seed,
      'total_steps': scaled(steps),
      'log_every': 50,
      **({'roles': {'policy': {'init': init}}} if init else {}),
      'data': {**data, 'batch_size': 64, 'max_length': 96},
      'objective': {'name': 'sft'},
      'optim': {'learning_rate': learning_rate, 'schedule': 'cosine', 'warmup_updates': 10},
      **saved,
      **more,
    }

  def rl(
    init: str,
    steps: int,
    rewards: dict,
    data: dict | None = None,
    models: dict | None = None,
    learning_rate: float = 3e-4,
    **objective,
  ) -> dict:
    return {
      'seed': seed,
      'total_steps': scaled(steps),
      'log_every': 5,
      'roles': {'policy': {'init': init}, **({'reward': models} if models else {})},
      'data': {**(data or sums), 'batch_size': 32, 'max_prompt_length': 16},
      'objective': {'name': 'grpo', 'aggregation': 'token_mean', **objective},
      'rollout': rollout,
      'rewards': rewards,
      'optim': {'learning_rate': learning_rate, 'warmup_updates': 10},
      **saved,
    }

  def sample(init: str, data: dict, rewards: dict, models: dict | None = None, **generate) -> dict:
    return {
      'seed': seed,
      'roles': {'policy': {'init': init}, **({'reward': models} if models else {})},
      'data': {**data, 'max_prompt_length': 16},
      'rollout': rollout,
      'rewards': rewards,
      'generate': {'seed': seed, 'batch_size': 250, **generate},
    }

  def reward_model(rows: str, objective: dict) -> dict:
    return {
      'seed': seed,
      'total_steps': scaled(120),
      'log_every': 20,
      'roles': {'policy': {'init': '{workdir}/base'}},
      'data': {'task': 'reviews', 'train_size': 8000, 'options': {'rows': rows}, 'batch_size': 64, 'max_length': 64},
      'objective': objective,
      'optim': {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_updates': 10},
      'eval': {
        'every': scaled(120),
        'at_start': False,
        'size': eval_size,
        'batch_size': min(100, eval_size),
        'seed': eval_seed,
        'evaluators': {'held out': {'kind': 'ranking'}},
      },
      **saved,
    }

  readable = (
    {'name': 'format'},
    {'name': 'language', 'language': 'en', 'least': 1.0},
    {'name': 'repetition', 'ngram_size': 8, 'most': 0.1},
    {'name': 'duplicates'},
  )
  author = {'mixture': {
    'sums': {'task': 'arithmetic', 'train_size': 40_000, 'options': {**TASK, **AUTHOR}, 'weight': 3.0},
    'reviews': {'task': 'reviews', 'train_size': 10_000, 'options': {'rows': 'demonstrations'}},
  }}  # fmt: skip
  helpful, safe = {'helpful': {'init': '{workdir}/rm_helpful'}}, {'safe': {'init': '{workdir}/rm_safe'}}
  final = {'task': 'dataset', 'path': '{workdir}/sft2_data/data.jsonl'}
  stages = {
    'base': sft(author, 700, 2e-3, '', model={'preset': 'nano'}),
    'r1_zero': rl('{workdir}/base', 90, rules, beta=0.001, ref_model_sync_updates=sync),
    'r1_zero_consistent': rl('{workdir}/base', 90, consistent, beta=0.001, ref_model_sync_updates=sync),
    'zero_sampled': sample('{workdir}/r1_zero', sums, rules, keep='correct', size=scaled(500), num_samples=8, max_per_prompt=8),
    'base_sampled': sample(
      '{workdir}/base', sums, rules, keep='correct', first=scaled(500), size=scaled(1000), num_samples=8, max_per_prompt=8,
    ),
    'cold': {'filter': {
      'inputs': {'r1_zero': '{workdir}/zero_sampled/data.jsonl', 'base': '{workdir}/base_sampled/data.jsonl'},
      'steps': (*readable, {'name': 'per_prompt', 'most': 2}),
    }},
    'sft1': sft({'task': 'dataset', 'path': '{workdir}/cold/data.jsonl'}, 100),
    'rl1': rl('{workdir}/sft1', 60, consistent, learning_rate=1e-4),
    'sampled': sample('{workdir}/rl1', sums, rules, keep='correct', first=scaled(1500), size=scaled(1500), num_samples=4, max_per_prompt=4),
    'reasoning': {'filter': {'inputs': {'rl1': '{workdir}/sampled/data.jsonl'}, 'steps': readable}},
    'rm_helpful': reward_model('rankings', {'name': 'reward_model'}),
    'rm_safe': reward_model('labels', {'name': 'outcome_reward_model'}),
    'general': sample(
      '{workdir}/base', reviews, {'functions': ('helpful',)}, helpful, keep='best', size=scaled(700), num_samples=4,
    ),
    'sft2_data': {'filter': {
      'inputs': {'reasoning': '{workdir}/reasoning/data.jsonl', 'general': '{workdir}/general/data.jsonl'},
      'steps': ({'name': 'duplicates'},), 'sizes': {'reasoning': scaled(1200), 'general': scaled(400)}, 'seed': seed,
    }},
    'sft2': sft(final, 150),
    'rl2': rl('{workdir}/sft2', 40, consistent, learning_rate=1e-4),
    'rl2_general': rl(
      '{workdir}/rl2', 30,
      {
        'functions': ('accuracy', 'format', 'language', 'helpful', 'safe'), 'weights': (1.0, 0.2, language_weight, 1.0, 1.0),
        'only': dict.fromkeys(('accuracy', 'format', 'language'), ('sums',)) | {'helpful': ('reviews',), 'safe': ('reviews',)},
      },
      {'mixture': {'sums': sums, 'reviews': reviews}}, helpful | safe, learning_rate=1e-4, beta=0.02,
    ),
    'student_base': sft(author, 700, 2e-3, '', model={'preset': 'nano', 'arch': STUDENT}),
    'student_distilled': sft(final, 300, init='{workdir}/student_base'),
    'student_clean': sft(
      {**sums, 'train_size': scaled(1200), 'options': {**TASK, 'languages': {'en': 1.0}}}, 300, init='{workdir}/student_base'
    ),
    'student_rl': rl('{workdir}/student_base', 80, rules),
  }  # fmt: skip
  with_tables: dict = {}
  for name, settings in stages.items():
    with_tables[name] = settings
    if 'objective' in settings and not name.startswith('rm_'):
      with_tables[f'{name}_eval'] = evaluation(name)
    if name in ('rl2', 'rl2_general'):
      with_tables[f'{name}_reviews'] = evaluation_of_reviews(name)
  return {'stages': with_tables}
