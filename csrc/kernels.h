// Launchers: raw pointers in, multi-threaded and vectorised work out.
//
// They trust their arguments (see ops.h for the checks) and know nothing of Python.
#pragma once

#include <cstdint>

#include "element.h"

namespace tubelet {

enum class DType { f32, f16, bf16, other };

// Limits the threads of every kernel from now on, in the whole process; 0: as many as there are cores.
void set_threads(int limit);

// cos, sin: [t*h*w, pairs of all three axes]. axes: t, h, w.
void launch_rope3d(float* cos, float* sin, const RopeAxis (&axes)[3]);

// tokens: [t*h*w rows of `stride` elements], latent: [channels, t*pt, h*ph, w*pw]; elements of `size` bytes.
void launch_pack(void* tokens, int64_t stride, const void* latent, const Patching& patching, int64_t size);
void launch_unpack(void* latent, const void* tokens, int64_t stride, const Patching& patching, int64_t size);

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
};

// state = matrix @ [state, velocity], in place; a buffer whose column is zero is not read, an unchanged one not
// written.
void launch_guided_step(const GuidedStep& step);

}  // namespace tubelet
