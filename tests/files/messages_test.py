"""Values of any file in messages."""

from dpo_flax.files.messages import shown, shown_list


def test_plain_text_is_shown_as_it_is():
  assert shown('model.norm.weight') == 'model.norm.weight'


def test_what_a_terminal_would_act_on_is_escaped():
  assert shown('a\nb\u202e\x1b[2J') == r"'a\nb\u202e\x1b[2J'"
  assert shown(['\ud800']) == r"['\ud800']"


def test_messages_stay_short():
  assert len(shown('x' * 10_000)) < 300
  assert len(shown([[]] * 10_000)) < 300
  assert shown_list(map(str, range(1005))).endswith('\n  999\n  and 5 more')
  assert shown_list(['a']) == '\n  a'
