"""The tables of benchmarks/profile_step.py: what is read from a program's text and from a trace."""

import hlo
import jax
import jax.numpy as jnp
import profile_step
import pytest
import train_step
from jax.profiler import ProfileData

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused_computation (param_0: bf16[8,16], param_1: f32[4,8]) -> f32[8,16] {
  %param_0 = bf16[8,16]{1,0} parameter(0)
  %convert.1 = f32[8,16]{1,0} convert(%param_0)
  ROOT %multiply.1 = f32[8,16]{1,0} multiply(%convert.1, %convert.1), metadata={op_name="jit(train_step)/jvp(norm)/mul"}
}

%slicing (param_0.1: f32[30,8,16]) -> f32[1,8,16] {
  %param_0.1 = f32[30,8,16]{2,1,0} parameter(0)
  %bitcast.1 = f32[30,8,16]{2,1,0} bitcast(%param_0.1)
  ROOT %slice.1 = f32[1,8,16]{2,1,0} slice(%bitcast.1), slice={[3:4], [0:8], [0:16]}
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %gte.1 = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %custom-call.1 = (bf16[8,8]{1,0}, s8[1024]{0}) custom-call(%gte.1, %gte.1), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(train_step)/transpose(jvp(loss))/dot_general"}, backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
}

%condition (arg.1: (s32[], bf16[8,16])) -> pred[] {
}

ENTRY %main (x: bf16[8,16], w: f32[30,8,16]) -> f32[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = f32[30,8,16]{2,1,0} parameter(1)
  %loop_slice_fusion = f32[1,8,16]{2,1,0} fusion(%w), kind=kLoop, calls=%slicing
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %loop_multiply_fusion.2 = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation
}
"""

WRAPPED = """HloModule jit_train_step, is_scheduled=true

%dynamic-slice-fusion (p.0: bf16[30,8,16], p.1: bf16[4,16]) -> bf16[4,8] {
  %p.0 = bf16[30,8,16]{2,1,0} parameter(0)
  %slice.1 = bf16[1,8,16]{2,1,0} slice(%p.0), slice={[3:4], [0:8], [0:16]}
  %bitcast.1 = bf16[8,16]{1,0} bitcast(%slice.1)
  %p.1 = bf16[4,16]{1,0} parameter(1)
  ROOT %mpmd_map.7 = bf16[4,8]{1,0} custom-call(%p.1, %bitcast.1), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(train_step)/jvp(feed_forward)/gated_matmul/mpmd_map"}
}

ENTRY %main (w: bf16[30,8,16], x: bf16[4,16]) -> bf16[4,8] {
  %w = bf16[30,8,16]{2,1,0} parameter(0)
  %x = bf16[4,16]{1,0} parameter(1)
  ROOT %dynamic_slice_fusion.1 = bf16[4,8]{1,0} fusion(%w, %x), kind=kCustom, calls=%dynamic-slice-fusion
}
"""

TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #7(Compute)" timestamp_ns: 0
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000
      stats { metadata_id: 1 str_value: "loop_multiply_fusion.2" }
      stats { metadata_id: 2 str_value: "jit_train_step" } }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 10000000
      stats { metadata_id: 1 str_value: "custom-call.1" } stats { metadata_id: 2 str_value: "jit_train_step" } }
    events { metadata_id: 2 offset_ps: 15000000 duration_ps: 6000000
      stats { metadata_id: 1 str_value: "elsewhere" } stats { metadata_id: 2 str_value: "jit_other" } }
    events { metadata_id: 3 offset_ps: 21000000 duration_ps: 1000000 }
  }
  lines { name: "XLA Ops" events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_multiply_fusion_2" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_tst_128x128" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
}
"""


def test_a_kernel_that_reads_a_slice_is_known_by_its_own_name():
    ((name, kernel),) = hlo.kernels(WRAPPED).items()
    assert (name, kernel.name, kernel.kind, kernel.part) == ("mpmd_map.7", "mpmd_map.7", "own kernel", "feed_forward")
    assert kernel.bytes == 2 * (4 * 8 + 4 * 16 + 8 * 16)


def test_a_program_is_read_with_its_loops_slices_and_products():
    kernels = hlo.kernels(PROGRAM)
    assert set(kernels) == {"loop_slice_fusion", "loop_multiply_fusion.2", "custom-call.1"}
    product = kernels["custom-call.1"]
    assert (product.kind, product.part, product.direction, product.times) == ("matmul", "loss", "backward", 5)
    assert product.flops == 2 * 8 * 8 * 16
    square = kernels["loop_multiply_fusion.2"]
    assert (square.kind, square.part, square.bytes) == ("elementwise", "norm", 8 * 16 * (2 + 4))
    # One layer of thirty is read and written, not the whole stack.
    assert (kernels["loop_slice_fusion"].kind, kernels["loop_slice_fusion"].bytes) == ("copy", 2 * 8 * 16 * 4)


def test_a_trace_is_joined_with_its_program():
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(TRACE))
    profile = profile_step.read_trace(data, "jit_train_step")
    assert profile.nanoseconds == {"loop_multiply_fusion.2": 4000, "custom-call.1": 10000, "MemcpyD2D": 1000}
    assert (profile.busy, profile.span) == (15000, 22000)
    rows = {row.kernel.name: row for row in profile_step.measured_rows(profile, hlo.kernels(PROGRAM), steps=2)}
    assert rows["loop_multiply_fusion.2"].milliseconds == pytest.approx(0.002)
    assert rows["custom-call.1"].calls == 0.5
    assert rows["MemcpyD2D"].kernel.kind == "copy"


def test_a_trace_without_kernels_is_refused_with_what_it_has():
    trace = TRACE.replace("Stream #7(Compute)", "Steps")
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(trace))
    with pytest.raises(ValueError, match=r"no events of jit_train_step.*Steps"):
        profile_step.read_trace(data, "jit_train_step")


def test_a_real_program_and_trace_are_joined(tmp_path):
    step = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(jnp.ones((64, 32)), jnp.ones((32, 16))).compile()
    kernels = hlo.kernels(step.as_text())
    assert sum(kernel.flops for kernel in kernels.values()) == 2 * 64 * 32 * 16
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(step(jnp.ones((64, 32)), jnp.ones((32, 16))))
    trace = next(tmp_path.rglob("*.xplane.pb"))
    rows = profile_step.measured_rows(
        profile_step.read_trace(ProfileData.from_file(str(trace)), "jit__lambda"), kernels, steps=1
    )
    assert "matmul" in {row.kernel.kind for row in rows}


def test_random_documents_have_the_mean_that_was_asked_for_and_restart_positions():
    batch = train_step.make_batch(100, 64, 4096, documents=256)
    assert 64 * 4096 / batch.documents.max(axis=1).sum() == pytest.approx(256, rel=0.25)
    starts = batch.positions == 0
    assert (starts.sum(axis=1) == batch.documents.max(axis=1)).all()
