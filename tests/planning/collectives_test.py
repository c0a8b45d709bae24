"""What compiled programs send, read from their text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from distill.planning.collectives import sent_bytes


@pytest.mark.parametrize(
    "collective, expected",
    [
        (lambda x: jax.lax.psum(x, "i"), 2 * 7 / 8 * 4096),
        (lambda x: jax.lax.all_gather(x, "i"), 7 * 4096),
        (lambda x: jax.lax.psum_scatter(x.reshape(8, -1), "i"), 7 / 8 * 4096),
        (lambda x: jax.lax.ppermute(x, "i", [(j, (j + 1) % 8) for j in range(8)]), 4096),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "collective-permute"],
)
def test_bytes_sent_in_loops_of_a_compiled_program(collective, expected):
    """1024 floats per device, in a loop of 5 turns within one of 3."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def turn(x, _):
        return x + jnp.sum(collective(x)), None

    def program(x):
        twice = lambda x, _: jax.lax.scan(turn, x, None, 5)  # noqa: E731
        return jax.lax.scan(lambda x, _: (twice(x, None)[0], None), x, None, 3)[0]

    spec = PartitionSpec("i")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(8 * 1024)).compile().as_text()
    assert sum(sent_bytes(text, 8).values()) == pytest.approx(15 * expected, rel=0.01)


TPU_PROGRAM = """
%fused_start (p.0: bf16[8,4]) -> (bf16[8,4], bf16[8,16]) {
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[8,4], bf16[8,16]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: bf16[8,4]) -> bf16[8,16] {
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
}

%condition (s.0: (u32[], bf16[8,4])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8)
  %s.0 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = u32[]{:T(128)} get-tuple-element(%s.0), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%gte.1, %constant.1), direction=LT
}

%body (s.1: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %s.1 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = u32[]{:T(128)} get-tuple-element(%s.1), index=0
  %gte.3 = bf16[8,4]{1,0} get-tuple-element(%s.1), index=1
  %constant.2 = u32[]{:T(128)} constant(2)
  %add.1 = u32[]{:T(128)} add(%gte.2, %constant.2)
  %permute.1 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%gte.3), \
channel_id=8, source_target_pairs={{0,1},{1,0}}
  %permute.2 = bf16[8,4]{1,0} collective-permute-done(%permute.1)
  %fusion.1 = bf16[8,16]{1,0} fusion(%gte.3), kind=kLoop, calls=%async_collective_fusion.1
  ROOT %tuple.1 = (u32[], bf16[8,4]) tuple(%add.1, %permute.2)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %start.1 = (bf16[8,4], bf16[8,16]) fusion(%x), kind=kCustom, calls=%fused_start
  %while.1 = (u32[]{:T(128)}, bf16[8,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_tpu_programs_overlap_gathers_and_count_in_steps():
    """A gather that goes on beside a loop counts once; 8 in steps of 2 are 4 turns."""
    sent = sent_bytes(TPU_PROGRAM, num_devices=8)
    assert sent == {"all-gather": 3 / 4 * 256, "collective-permute": 4 * (64 + 2)}


def test_collectives_of_one_channel_are_all_counted():
    """As shard_map's are: a sum over 8 devices, then a maximum, then a gather."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(x):
        return jax.lax.all_gather(jax.lax.pmax(jnp.sin(jax.lax.psum(x, "i")), "i"), "i")

    spec = PartitionSpec("i")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(8 * 1024)).compile().as_text()
    sent = sent_bytes(text, 8)
    assert sent == {"all-reduce": 2 * 2 * 7 / 8 * 4096, "all-gather": 7 * 4096}
