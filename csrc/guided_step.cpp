// One pass over memory for guidance, the sampler's update, pinning of known tokens and the denoiser's next input.
//
// A block of elements is read, combined in cache and only then written, so the state may be updated
// in place. Sums run in column order without fused multiply-adds: every instruction set gives the same numbers.
#include "kernels.h"
#include "parallel.h"

namespace tubelet {
namespace {

constexpr int64_t kBlock = 2048;  // elements: few enough for the caches, enough to read each buffer in long runs

template <class T>
struct Step : GuidedStep {
    bool streamed;

    Step(const GuidedStep& step, bool streamed) : GuidedStep(step), streamed(streamed) {}

    TUBELET_HD void operator()(int64_t begin, int64_t end) const {
        alignas(64) float next[kMaxBuffers][kBlock], scratch[3][kBlock];
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t size = std::min(kBlock, end - at);
            const float* const guided = reads[buffers] ? guided_velocity(scratch, at, size) : nullptr;
            for (int row = 0; row < buffers; ++row)
                if (writes[row] || row == 0) combine(next[row], row, guided, at, size);
            if (known) pin_known(next[0], at, size);
            for (int row = 0; row < buffers; ++row)
                if (writes[row]) write(state[row] + at, next[row], size * sizeof(float), streamed && !reads[row]);
            write_tokens(next[0], at, size);
        }
        if (streamed) fence();
    }

    TUBELET_HD const float* guided_velocity(float (*scratch)[kBlock], int64_t at, int64_t size) const {
        const T* const conditional = static_cast<const T*>(velocity) + at;
        const float* const one = as(scratch[0], conditional, size);
        if (batch == 1) return one;
        const float* const other = as(scratch[1], conditional + count * width, size);
        float* const __restrict guided = scratch[2];
        for (int64_t i = 0; i < size; ++i) guided[i] = guide(one[i], other[i], guidance);
        return guided;
    }

    TUBELET_HD void combine(float* __restrict sum, int row, const float* guided, int64_t at, int64_t size) const {
        bool first = true;
        for (int column = 0; column <= buffers; ++column) {
            const float factor = matrix[row][column];
            if (factor == 0.0f) continue;
            const float* __restrict term = column < buffers ? state[column] + at : guided;
            if (first)
                for (int64_t i = 0; i < size; ++i) sum[i] = factor * term[i];
            else
                for (int64_t i = 0; i < size; ++i) sum[i] += factor * term[i];
            first = false;
        }
        if (first) std::fill_n(sum, size, 0.0f);
    }

    // Calls part(token, offset of the part in its row, offset in the block, size) for each row the block touches.
    template <class Part>
    TUBELET_HD void for_rows(int64_t at, int64_t size, const Part& part) const {
        int64_t token = at / width, column = at % width;
        for (int64_t done = 0, n; done < size; done += n, ++token, column = 0) {
            n = std::min(width - column, size - done);
            part(token, column, done, n);
        }
    }

    TUBELET_HD void pin_known(float* next, int64_t at, int64_t size) const {
        for_rows(at, size, [&](int64_t token, int64_t, int64_t done, int64_t n) TUBELET_INLINE_LAMBDA {
            if (known[token] == 0.0f) return;
            for (int64_t i = done; i < done + n; ++i)
                next[i] =
                    noise ? pin(clean[at + i], noise[at + i], clean_scale, noise_scale) : clean_scale * clean[at + i];
        });
    }

    TUBELET_HD void write_tokens(const float* next, int64_t at, int64_t size) const {
        alignas(64) T buffer[kBlock];
        const T* const cast = as(buffer, next, size);
        for (int b = 0; b < batch; ++b) {
            T* const rows = static_cast<T*>(tokens) + b * batch_stride;
            if (token_stride == width)
                write(rows + at, cast, size * sizeof(T), streamed);
            else
                for_rows(at, size, [&](int64_t token, int64_t column, int64_t done, int64_t n) TUBELET_INLINE_LAMBDA {
                    write(rows + token * token_stride + column, cast + done, n * sizeof(T), false);
                });
        }
    }

    // The values in another format: converted in `buffer`, or where they are.
    template <class To>
    TUBELET_HD static const To* as(To*, const To* values, int64_t) {
        return values;
    }

    template <class To, class From>
    TUBELET_HD static const To* as(To* buffer, const From* values, int64_t size) {
        convert(buffer, values, size);
        return buffer;
    }

    TUBELET_HD static void write(void* to, const void* from, int64_t bytes, bool past_cache) {
        if (past_cache)
            stream(to, from, bytes);
        else
            memcpy(to, from, bytes);
    }
};

template <class T>
void launch(const GuidedStep& step) {
    const int64_t bytes = (step.buffers + step.batch) * int64_t(sizeof(float));  // of one element, roughly
    const int64_t elements = step.count * step.width;
    parallel(elements, bytes, Step<T>(step, elements * bytes > kStreamedBytes));
}

}  // namespace

void launch_guided_step(const GuidedStep& step) {
    switch (step.dtype) {
        case DType::f32:
            return launch<float>(step);
        case DType::f16:
            return launch<Half>(step);
        default:
            return launch<BFloat>(step);
    }
}

}  // namespace tubelet
