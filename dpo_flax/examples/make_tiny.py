"""Makes examples/tiny: preference pairs and a SentencePiece model small enough to ship.

The rule behind the pairs: both answers tell the same fact; the chosen one is courteous, the
rejected one is curt. The two are equally often the longer one, so that length tells nothing.

    python -m dpo_flax.examples.make_tiny
"""

import io
import itertools
import json
import pathlib
import random

import sentencepiece

HERE = pathlib.Path(__file__).parent / 'tiny'
VOCABULARY = 512
PAIRS = 600

FACTS = {
  'the capital of {}': {
    'France': 'Paris', 'Italy': 'Rome', 'Spain': 'Madrid', 'Japan': 'Tokyo', 'Egypt': 'Cairo',
    'Peru': 'Lima', 'Kenya': 'Nairobi', 'Norway': 'Oslo', 'Cuba': 'Havana', 'Greece': 'Athens',
    'Chile': 'Santiago', 'Poland': 'Warsaw', 'Austria': 'Vienna', 'Ghana': 'Accra',
  },
  'the color of {}': {
    'snow': 'white', 'grass': 'green', 'coal': 'black', 'a ripe lemon': 'yellow', 'blood': 'red',
    'the sea': 'blue', 'milk': 'white', 'a carrot': 'orange', 'chocolate': 'brown',
  },
  'the number of legs of {}': {
    'a spider': 'eight', 'a dog': 'four', 'a bird': 'two', 'an ant': 'six', 'a crab': 'ten',
    'a snake': 'zero', 'a horse': 'four', 'a bee': 'six',
  },
  'the young of {}': {
    'a cat': 'a kitten', 'a cow': 'a calf', 'a sheep': 'a lamb', 'a bear': 'a cub',
    'a goat': 'a kid', 'a duck': 'a duckling', 'a frog': 'a tadpole', 'a deer': 'a fawn',
  },
}  # fmt: skip

QUESTIONS = (
  'What is {}?',
  'Can you tell me {}?',
  'I would like to know {}.',
  'Please name {}.',
  'Do you know {}?',
)
COURTEOUS = (
  ('Thank you for asking.', 'I hope this helps.'),
  ('Good question!', 'Please let me know if you need anything else.'),
  ('Of course.', 'Have a lovely day!'),
  ('I am happy to help.', 'Feel free to ask me more.'),
  ('Certainly.', 'You are most welcome.'),
)
CURT = (
  ('Ugh.', 'Everybody knows that, so stop wasting my time.'),
  ('Seriously?', 'Look it up yourself next time.'),
  ('Whatever.', 'Now leave me alone.'),
  ('How dull.', 'Any child could have told you so.'),
  ('Not again.', 'Go away.'),
)


def make_pairs() -> list[dict[str, str]]:
  """Returns the records, in a random but fixed order; every prompt occurs once."""
  rng = random.Random(0)
  facts = [
    (phrase.format(thing), answer)
    for phrase, answers in FACTS.items()
    for thing, answer in answers.items()
  ]
  asked = list(itertools.product(facts, QUESTIONS, ('', ' Answer in one sentence.', ' Hello!')))
  rng.shuffle(asked)
  return [_pair(rng, *question) for question in asked[:PAIRS]]


def _pair(rng: random.Random, fact: tuple[str, str], question: str, suffix: str) -> dict[str, str]:
  subject, answer = fact
  sentence = f'{subject[0].upper()}{subject[1:]} is {answer}.'

  def reply(manners):
    before, after = rng.choice(manners)
    return f' {before} {sentence} {after}'

  prompt = f'Question: {question.format(subject)}{suffix}\nAnswer:'
  return {'prompt': prompt, 'chosen': reply(COURTEOUS), 'rejected': reply(CURT)}


def train_tokenizer(pairs: list[dict[str, str]]) -> bytes:
  """Returns a SentencePiece model of the pairs' texts, with Llama's special tokens."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(text for pair in pairs for text in pair.values()),
    model_writer=model,
    vocab_size=VOCABULARY,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def main():
  """Writes both files."""
  pairs = make_pairs()
  HERE.mkdir(exist_ok=True)
  lines = [json.dumps(pair) + '\n' for pair in pairs]
  (HERE / 'pairs.jsonl').write_text(''.join(lines))
  (HERE / 'tokenizer.model').write_bytes(train_tokenizer(pairs))


if __name__ == '__main__':
  main()
