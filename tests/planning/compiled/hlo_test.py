"""Tests that the text of a compiled program is read whole or refused."""

# ruff: noqa: E501 - an instruction of a compiled program is one line

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_flax.planning.compiled import hlo
from dpo_flax.planning.compiled.arithmetic import matrix_flops

TEXT = textwrap.dedent("""\
  HloModule one, is_scheduled=true, num_partitions=2

  FileNames
  1 "/home/me/dpo_flax/model/layers.py"
  2 "/usr/lib/python3/site-packages/jax/numpy.py"

  FunctionNames
  1 "f"

  FileLocations
  1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=2 end_column=9}
  2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=2 end_column=9}

  StackFrames
  1 {file_location_id=1 parent_frame_id=0}
  2 {file_location_id=2 parent_frame_id=2}


  %body (p: f32[4]) -> f32[4] {
    %p = f32[4]{0} parameter(0)
    ROOT %n = f32[4]{0} negate(%p)
  }

  ENTRY %main (a: f32[4]) -> (f32[4], bf16[3,200]) {
    %a = f32[4]{0} parameter(0)
    %b = bf16[3,200]{1,0:T(8,128)(2,1)S(1)} broadcast(%a), dimensions={}
    %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%body, metadata={op_name="jit(f)/neg" stack_frame_id=2}
    ROOT %t = (f32[4]{0}, /*index=1*/bf16[3,200]{1,0:T(8,128)(2,1)S(1)}) tuple(%f, %b)
  }
  """)


def test_every_part_of_an_instruction_is_read():
  program = hlo.parse(TEXT)
  assert list(program.entry) == ['a', 'b', 'f', 't']
  assert program.num_partitions == 2
  fused, made = program.entry['f'], program.entry['b'].arrays[0]
  assert (fused.opcode, fused.operands, fused.called()) == ('fusion', ('a',), ['body'])
  assert (made.dims, made.space, made.bytes) == ((3, 200), 1, 1200)
  assert made.stored_bytes == 8 * 256 * 2
  assert program.entry.root.operands == ('f', 'b')
  assert [str(array) for array in program.entry.root.arrays] == ['f32[4]', 'bf16[3,200]']


def test_source_is_the_innermost_line_of_the_package():
  program = hlo.parse(TEXT)
  assert program.source(program.entry['f'], 'dpo_flax') == 'model/layers.py:12'
  assert program.source(program.entry['b'], 'dpo_flax') is None


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('calls=%body', 'calls=%other', 'runs other'),
    ('kind=kLoop, calls=%body', 'kind=kLoop', 'nothing runs the computations body'),
    ('ENTRY ', '', 'no ENTRY'),
    ('fusion(%a), kind', 'fusion(%a, kind', 'unbalanced'),
    ('  ROOT %n = f32[4]{0} negate(%p)', '  what is this', 'not an instruction'),
  ],
)
def test_text_that_is_not_understood_is_refused(old, new, message):
  with pytest.raises(ValueError, match=message):
    hlo.parse(TEXT.replace(old, new))


def test_convolution_of_batches_counts_only_products_of_inputs():
  # The compiler for TPU writes eight products of [5, 6] x [6, 7] as a window over their number.
  text = textwrap.dedent("""\
    HloModule one

    ENTRY %main (a: f32[8,5,6], b: f32[8,6,7]) -> f32[8,5,7] {
      %a = f32[8,5,6]{2,1,0} parameter(0)
      %b = f32[8,6,7]{2,1,0} parameter(1)
      ROOT %c = f32[8,5,7]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
    }
    """)
  entry = hlo.parse(text).entry
  assert matrix_flops(entry['c']) == 8 * 2 * 5 * 6 * 7


def test_convolution_with_padding_counts_the_places_inside():
  signal, kernel = np.ones(10), np.ones(4)
  inside = np.convolve(signal, kernel).sum()  # every pair of an input and a weight
  text = textwrap.dedent("""\
    HloModule one

    ENTRY %main (a: f32[1,10,1], b: f32[4,1,1]) -> f32[1,13,1] {
      %a = f32[1,10,1]{2,1,0} parameter(0)
      %b = f32[4,1,1]{2,1,0} parameter(1)
      ROOT %c = f32[1,13,1]{2,1,0} convolution(%a, %b), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_0io->b0f
    }
    """)
  entry = hlo.parse(text).entry
  assert matrix_flops(entry['c']) == pytest.approx(2 * inside)


def test_every_program_of_this_machine_is_read_whole():
  def everything(x, n):
    x = jax.lax.fori_loop(0, n, lambda i, x: jnp.sort(x) @ x, x)
    return jax.lax.cond(x[0, 0] > 0, jnp.cumsum, lambda x: x.reshape(-1), x)

  text = jax.jit(everything).lower(jnp.ones((4, 4)), 3).compile().as_text()
  program = hlo.parse(text)
  assert sum(map(len, program.computations.values())) == sum(
    ' = ' in line and line.startswith('  ') for line in text.splitlines()
  )
