"""Tests which arrays are alive at a program's peak."""

import textwrap

from dpo_flax.planning.compiled import hlo, memory

# b and c are alive together; d replaces them. The loop's own temporary comes on top of c.
TEXT = textwrap.dedent("""\
  HloModule one, is_scheduled=true

  %body (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
    %p = (s32[], f32[1024]{0}) parameter(0)
    %i = s32[]{:S(6)} get-tuple-element(%p), index=0
    %x = f32[1024]{0} get-tuple-element(%p), index=1
    %wide = f32[4096]{0} broadcast(%x), dimensions={}
    %y = f32[1024]{0} slice(%wide), slice={[0:1024]}
    ROOT %out = (s32[], f32[1024]{0}) tuple(%i, %y)
  }

  %more (q: (s32[], f32[1024])) -> pred[] {
    %q = (s32[], f32[1024]{0}) parameter(0)
    ROOT %never = pred[]{:S(6)} constant(false)
  }

  ENTRY %main (a: f32[1024]) -> f32[1024] {
    %a = f32[1024]{0} parameter(0)
    %b = f32[2048]{0} broadcast(%a), dimensions={}
    %near = f32[1024]{0:S(1)} slice(%b), slice={[0:1024]}
    %c = f32[1024]{0} add(%near, %near)
    %d = f32[1024]{0} negate(%c)
    %zero = s32[]{:S(6)} constant(0)
    %start = (s32[], f32[1024]{0}) tuple(%zero, %d)
    %loop = (s32[], f32[1024]{0}) while(%start), condition=%more, body=%body
    %e = f32[1024]{0} get-tuple-element(%loop), index=1
    ROOT %r = f32[1024]{0} add(%e, %c)
  }
  """)


def test_peak_holds_what_is_read_later_and_the_inside_of_loops():
  found = memory.peak(hlo.parse(TEXT))
  assert sorted(one.maker.name for one in found.alive) == ['c', 'd', 'wide']
  assert found.bytes == 4 * (1024 + 1024 + 4096)


def test_results_arguments_and_other_memories_are_no_temporaries():
  names = {one.maker.name for one in memory.peak(hlo.parse(TEXT)).alive}
  assert not names & {'a', 'near', 'r', 'y'}


def test_updates_in_place_make_no_copy():
  text = textwrap.dedent("""\
    HloModule one

    ENTRY %main (u: f32[1,16], i: s32[]) -> f32[1,16] {
      %u = f32[1,16]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %x = f32[8,16]{1,0} broadcast(%u), dimensions={}
      %new = f32[8,16]{1,0} dynamic-update-slice(%x, %u, %i, %i)
      ROOT %r = f32[1,16]{1,0} slice(%new), slice={[0:1], [0:16]}
    }
    """)
  found = memory.peak(hlo.parse(text))
  assert [one.maker.name for one in found.alive] == ['x']


def test_largest_source_comes_first():
  program = hlo.parse(TEXT)
  rows = memory.by_source(memory.peak(program).alive, program, 'dpo_flax')
  assert (rows[0]['bytes'], rows[0]['source']) == (16384, 'wide')
  assert [row['bytes'] for row in rows] == [16384, 4096, 4096]
