// What each operation works on, as plain structs of raw pointers, and the launchers that do it on the CPU,
// multi-threaded and vectorised; those for CUDA are in cuda/launch.h.
//
// Launchers trust their arguments (see ops.h for the checks) and know nothing of Python.
#pragma once

#include <cstdint>

#include "element.h"

namespace tubelet {

enum class DType { f32, f16, bf16, other };

// Limits the threads of every kernel from now on, in the whole process; 0: as many as there are cores.
void set_threads(int limit);

struct RopeTable {
    float *cos, *sin;  // [tokens, pairs]
    RopeAxis axes[3];  // t, h, w

    TUBELET_HD int64_t tokens() const { return axes[0].size * axes[1].size * axes[2].size; }
    TUBELET_HD int64_t pairs() const { return axes[0].pairs + axes[1].pairs + axes[2].pairs; }
};

struct Packing {
    char* tokens;    // [t*h*w rows of `stride` elements]
    char* latent;    // [channels, t*pt, h*ph, w*pw]
    int64_t stride;  // a row's length in memory
    int64_t size;    // bytes of an element
    Patching patching;
};

constexpr int kMaxBuffers = 5;  // x and up to four history buffers

struct GuidedStep {
    int64_t count, width;  // N tokens of P values
    int buffers;           // S; state[0] is x
    float* state[kMaxBuffers];
    float matrix[kMaxBuffers][kMaxBuffers + 1];  // S rows of S+1 columns: the buffers, then the velocity
    DType dtype;                                 // of velocity and tokens
    const void* velocity;                        // [batch, N, P]: the conditional, then the unconditional
    int batch;                                   // 1 or 2
    float guidance;
    void* tokens;  // [batch, N, P]: where the new x goes
    int64_t token_stride, batch_stride;
    const float* known;  // [N] or null: tokens that are pinned
    const float* clean;  // [N, P] or null
    const float* noise;  // [N, P] or null
    float clean_scale, noise_scale;
    bool reads[kMaxBuffers + 1];  // column is used: a buffer, or last the velocity
    bool writes[kMaxBuffers];     // row changes its buffer
};

void launch_rope3d(const RopeTable& table);
void launch_pack(const Packing& packing);         // latent to tokens
void launch_unpack(const Packing& packing);       // tokens to latent
void launch_guided_step(const GuidedStep& step);  // state = matrix @ [state, velocity], in place

}  // namespace tubelet
