// Every CUDA kernel as KERNEL(symbol, its arguments, its body). A symbol ends with what a thread moves at once: f16x8
// is eight neighbours, 32x4 a tile of 4 x 4 chunks of 32 bits. Where that is 16 bytes, all that the kernel touches must
// be aligned to 16 bytes; the others need the dtype's own alignment. launch.cpp chooses. One that ends with _at does
// the same on arguments that lie in device memory.
#pragma once

#define TUBELET_CUDA_KERNELS(KERNEL)                                            \
    KERNEL(tubelet_rope3d_f32x4, RopeTable, rope3d<4>)                          \
    KERNEL(tubelet_rope3d_f32x1, RopeTable, rope3d<1>)                          \
    KERNEL(tubelet_pack_128x1, Packing, pack<Chunk128, 1>)                      \
    KERNEL(tubelet_pack_64x2, Packing, pack<uint64_t, 2>)                       \
    KERNEL(tubelet_pack_32x4, Packing, pack<uint32_t, 4>)                       \
    KERNEL(tubelet_pack_16x8, Packing, pack<uint16_t, 8>)                       \
    KERNEL(tubelet_pack_32x1, Packing, pack<uint32_t, 1>)                       \
    KERNEL(tubelet_pack_16x1, Packing, pack<uint16_t, 1>)                       \
    KERNEL(tubelet_unpack_128x1, Packing, unpack<Chunk128, 1>)                  \
    KERNEL(tubelet_unpack_64x2, Packing, unpack<uint64_t, 2>)                   \
    KERNEL(tubelet_unpack_32x4, Packing, unpack<uint32_t, 4>)                   \
    KERNEL(tubelet_unpack_16x8, Packing, unpack<uint16_t, 8>)                   \
    KERNEL(tubelet_unpack_32x1, Packing, unpack<uint32_t, 1>)                   \
    KERNEL(tubelet_unpack_16x1, Packing, unpack<uint16_t, 1>)                   \
    KERNEL(tubelet_guided_step_f32x4, GuidedStep, guided_step<float, 4>)        \
    KERNEL(tubelet_guided_step_f32x1, GuidedStep, guided_step<float, 1>)        \
    KERNEL(tubelet_guided_step_f16x8, GuidedStep, guided_step<Half, 8>)         \
    KERNEL(tubelet_guided_step_f16x1, GuidedStep, guided_step<Half, 1>)         \
    KERNEL(tubelet_guided_step_bf16x8, GuidedStep, guided_step<BFloat, 8>)      \
    KERNEL(tubelet_guided_step_bf16x1, GuidedStep, guided_step<BFloat, 1>)      \
    KERNEL(tubelet_guided_step_f32x4_at, GuidedStepAt, guided_step<float, 4>)   \
    KERNEL(tubelet_guided_step_f32x1_at, GuidedStepAt, guided_step<float, 1>)   \
    KERNEL(tubelet_guided_step_f16x8_at, GuidedStepAt, guided_step<Half, 8>)    \
    KERNEL(tubelet_guided_step_f16x1_at, GuidedStepAt, guided_step<Half, 1>)    \
    KERNEL(tubelet_guided_step_bf16x8_at, GuidedStepAt, guided_step<BFloat, 8>) \
    KERNEL(tubelet_guided_step_bf16x1_at, GuidedStepAt, guided_step<BFloat, 1>)
