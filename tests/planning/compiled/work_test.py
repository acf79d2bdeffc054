"""Tests the sums of a program's work against counts made by hand and closed forms."""

# ruff: noqa: E501 - an instruction of a compiled program is one line

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_flax.planning.compiled import hlo, work
from helpers.models import make_mesh_of

# A loop of 3 that holds a loop of 5, a branch and a collective; 64 bytes make an f32[16].
NESTED = textwrap.dedent("""\
  HloModule nested, is_scheduled=true, num_partitions=4

  %product (x: f32[4,4], y: f32[4,4]) -> f32[4,4] {
    %x = f32[4,4]{1,0} parameter(0)
    %y = f32[4,4]{1,0} parameter(1)
    ROOT %dot.1 = f32[4,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  }

  %inner_body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
    %p = (s32[], f32[4,4]{1,0}) parameter(0)
    %i = s32[] get-tuple-element(%p), index=0
    %two = s32[] constant(2)
    %next = s32[] add(%i, %two)
    %a = f32[4,4]{1,0} get-tuple-element(%p), index=1
    %b = f32[4,4]{1,0} fusion(%a, %a), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"10"}}
    ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %b)
  }

  %inner_more (p.1: (s32[], f32[4,4])) -> pred[] {
    %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
    %i.1 = s32[] get-tuple-element(%p.1), index=0
    %ten = s32[] constant(10)
    ROOT %more = pred[] compare(%i.1, %ten), direction=LT
  }

  %busy (q: f32[4,4]) -> f32[4,4] {
    %q = f32[4,4]{1,0} parameter(0)
    ROOT %dot.2 = f32[4,4]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"7"}
  }

  %idle (r: f32[4,4]) -> f32[4,4] {
    %r = f32[4,4]{1,0} parameter(0)
    ROOT %copy.1 = f32[4,4]{1,0} copy(%r), backend_config={"estimated_cycles":"1"}
  }

  %outer_body (s: (f32[4,4], s32[])) -> (f32[4,4], s32[]) {
    %s = (f32[4,4]{1,0}, s32[]) parameter(0)
    %a.1 = f32[4,4]{1,0} get-tuple-element(%s), index=0
    %j = s32[] get-tuple-element(%s), index=1
    %one = s32[] constant(1)
    %down = s32[] subtract(%j, %one)
    %zero = s32[] constant(0)
    %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %a.1)
    %while.1 = (s32[], f32[4,4]{1,0}) while(%start), condition=%inner_more, body=%inner_body
    %c = f32[4,4]{1,0} get-tuple-element(%while.1), index=1
    %is = s32[] constant(1)
    %branch = f32[4,4]{1,0} conditional(%is, %c, %c), branch_computations={%idle, %busy}
    %gathered = f32[8,4]{1,0} all-gather(%branch), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
    %kept = f32[4,4]{1,0} slice(%gathered), slice={[0:4], [0:4]}
    ROOT %out.1 = (f32[4,4]{1,0}, s32[]) tuple(%kept, %down)
  }

  %at_end (u: s32[]) -> pred[] {
    %u = s32[] parameter(0)
    %none = s32[] constant(0)
    ROOT %gt = pred[] compare(%u, %none), direction=GT
  }

  %outer_more (s.1: (f32[4,4], s32[])) -> pred[] {
    %s.1 = (f32[4,4]{1,0}, s32[]) parameter(0)
    %j.1 = s32[] get-tuple-element(%s.1), index=1
    ROOT %more.1 = pred[] fusion(%j.1), kind=kLoop, calls=%at_end
  }

  ENTRY %main (arg: f32[4,4]) -> f32[4,4] {
    %arg = f32[4,4]{1,0} parameter(0)
    %three = s32[] constant(3)
    %start.1 = (f32[4,4]{1,0}, s32[]) tuple(%arg, %three)
    %while.2 = (f32[4,4]{1,0}, s32[]) while(%start.1), condition=%outer_more, body=%outer_body
    ROOT %result = f32[4,4]{1,0} get-tuple-element(%while.2), index=0
  }
  """)


def test_loops_multiply_and_the_busiest_branch_counts():
  done = work.measure(hlo.parse(NESTED))
  assert done.estimated_cycles == 3 * (5 * 10 + 7)
  assert done.flops == 3 * (5 + 1) * 2 * 4 * 4 * 4
  assert done.collectives == {'all-gather': 3}
  assert done.collective_bytes == 3 * 64  # each gets the other's half
  assert done.conditionals == 3
  assert done.unknown_loops == 0
  assert done.flops_without_cycles == 0


def test_cycles_that_the_compiler_does_not_know_are_not_added():
  text = NESTED.replace('"estimated_cycles":"7"', f'"estimated_cycles":"{2**63 - 1}"')
  done = work.measure(hlo.parse(text))
  assert done.estimated_cycles == 3 * 5 * 10
  assert done.flops_without_cycles == 3 * 2 * 4 * 4 * 4


def test_loop_that_ends_by_data_counts_once_and_is_told():
  text = NESTED.replace('%three = s32[] constant(3)', '%three = s32[] parameter(1)')
  done = work.measure(hlo.parse(text))
  assert done.unknown_loops == 1
  assert done.estimated_cycles == 5 * 10 + 7


def test_known_trip_count_is_taken():
  known = 'body=%inner_body, backend_config={"known_trip_count":{"n":"9"}}'
  done = work.measure(hlo.parse(NESTED.replace('body=%inner_body', known)))
  assert done.estimated_cycles == 3 * (9 * 10 + 7)


@pytest.mark.parametrize(
  ('opcode', 'groups', 'received'),
  [
    ('all-reduce', '{}', 2 * 64 * 3 / 4),
    ('all-reduce', '{{0,1},{2,3}}', 64),
    ('reduce-scatter', '[1,4]<=[4]', 64 * 3 / 4),
    ('all-gather', "mesh['x'=2,'y'=2] {'x','y'}", 64 * 3),
    ('all-gather', "mesh['x'=4] {'x':(1)2}", 64),
    ('all-to-all', '[2,2]<=[4]', 32),
    ('collective-permute-start', '{}', 64),
  ],
)
def test_collectives_count_what_a_device_receives(opcode, groups, received):
  text = textwrap.dedent(f"""\
    HloModule one, num_partitions=4

    ENTRY %main (a: f32[16]) -> f32[16] {{
      %a = f32[16]{{0}} parameter(0)
      ROOT %c = f32[16]{{0}} {opcode}(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}
    }}
    """)
  assert work.measure(hlo.parse(text)).collective_bytes == received


def test_collective_beside_other_work_counts_once():
  steps = [
    textwrap.dedent(f"""\
      %step_{i} (a.{i}: f32[16]) -> f32[32] {{
        %a.{i} = f32[16]{{0}} parameter(0)
        ROOT %g.{i} = f32[32]{{0}} all-gather(%a.{i}), channel_id=7, replica_groups={{{{0,1}}}}
      }}
      """)
    for i in range(3)
  ]
  calls = ''.join(
    f'  %f.{i} = f32[32]{{0}} fusion(%a), kind=kCustom, calls=%step_{i}\n' for i in range(3)
  )
  entry = (
    f'ENTRY %main (a: f32[16]) -> f32[16] {{\n  %a = f32[16]{{0}} parameter(0)\n{calls}'
    '  ROOT %r = f32[16]{0} copy(%a)\n}\n'
  )
  done = work.measure(
    hlo.parse('HloModule async, num_partitions=2\n\n' + '\n'.join([*steps, entry]))
  )
  assert done.collectives == {'all-gather': 1}
  assert done.collective_bytes == 64


def test_kernels_are_counted_beside():
  text = textwrap.dedent("""\
    HloModule kernel

    ENTRY %main (a: f32[16]) -> f32[16] {
      %a = f32[16]{0} parameter(0)
      %k = f32[16]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
        "note":"a } brace",
    }}, metadata={op_name="jit(f)/attend"}
      ROOT %l = f32[16]{0} custom-call(%k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attend"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"500","transcendentals":"1"}}}
    }
    """)
  done = work.measure(hlo.parse(text))
  assert done.kernels == {'attend': 2}
  assert done.flops == done.flops_without_cycles == 500
  assert done.hbm_traffic_bytes == 4 * 64


def test_slices_and_updates_move_only_their_part():
  text = textwrap.dedent("""\
    HloModule parts

    %part (x: f32[8,16], i: s32[]) -> f32[1,16] {
      %x = f32[8,16]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %z = s32[] constant(0)
      ROOT %d = f32[1,16]{1,0:S(1)} dynamic-slice(%x, %i, %z), dynamic_slice_sizes={1,16}
    }

    %put (x.1: f32[8,16], u: f32[1,16], i.1: s32[]) -> f32[8,16] {
      %x.1 = f32[8,16]{1,0} parameter(0)
      %u = f32[1,16]{1,0:S(1)} parameter(1)
      %i.1 = s32[] parameter(2)
      %z.1 = s32[] constant(0)
      ROOT %w = f32[8,16]{1,0} dynamic-update-slice(%x.1, %u, %i.1, %z.1)
    }

    ENTRY %main (x.2: f32[8,16], i.2: s32[]) -> f32[8,16] {
      %x.2 = f32[8,16]{1,0} parameter(0)
      %i.2 = s32[]{:S(6)} parameter(1)
      %row = f32[1,16]{1,0:S(1)} fusion(%x.2, %i.2), kind=kLoop, calls=%part
      ROOT %new = f32[8,16]{1,0} fusion(%x.2, %row, %i.2), kind=kLoop, calls=%put
    }
    """)
  assert work.measure(hlo.parse(text)).hbm_traffic_bytes == 64 + 64


def test_compiled_loop_of_products_is_2mnk_times_trips():
  mesh = make_mesh_of(fsdp=4)
  rows, width, trips = 24, 32, 7

  def products(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  def shape(sizes, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)

  arguments = shape((rows, width), 'fsdp'), shape((trips, width, width), None, 'fsdp')
  text = jax.jit(products).lower(*arguments).compile().as_text()
  done = work.measure(hlo.parse(text))
  assert done.flops == trips * 2 * (rows // 4) * width * width
  assert done.unknown_loops == 0
  assert done.collective_bytes == pytest.approx(trips * width * width * 4 * 3 / 4)
