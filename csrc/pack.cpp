// Latents to tokens and back. For a strip of tokens (t, h, 0...w) both are one transposition,
// tokens [w, runs] <-> latent [runs, w], of chunks: the pw elements that are neighbours on both sides.
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace tubelet {
namespace {

// One side of the transposition, in bytes: where strips start, and each line within its strip.
struct Lines {
    char* base;
    int64_t strip_t, strip_h;
    std::vector<int64_t> offsets;
    bool prefetched = false;  // reading is asked for ahead: lines too short and many for the processor to foresee

    int64_t count() const { return int64_t(offsets.size()); }
    char* strip(int64_t t, int64_t h) const { return base + t * strip_t + h * strip_h; }

    bool aligned(int64_t size) const {
        int64_t bits = int64_t(reinterpret_cast<uintptr_t>(base)) | strip_t | strip_h;
        for (int64_t offset : offsets) bits |= offset;
        return bits % size == 0;  // sizes are powers of two
    }
};

Lines token_lines(const Packing& packing) {
    const Patching& p = packing.patching;
    const int64_t row = packing.stride * packing.size;
    Lines lines{packing.tokens, p.h * p.w * row, p.w * row, {}, true};
    for (int64_t w = 0; w < p.w; ++w) lines.offsets.push_back(w * row);
    return lines;
}

Lines latent_lines(const Packing& packing) {
    const Patching& p = packing.patching;
    Lines lines{packing.latent, strip_offset(p, 1, 0) * packing.size, strip_offset(p, 0, 1) * packing.size, {}};
    for (int64_t run = 0; run < p.runs(); ++run) lines.offsets.push_back(run_offset(p, run) * packing.size);
    return lines;
}

// to[i][j] = from[j][i] for chunks of any size.
struct TransposeAny {
    const Lines &to, &from;
    int64_t strips_h, chunk;

    TUBELET_HD void operator()(int64_t begin, int64_t end) const {
        for (int64_t at = begin; at < end; ++at) {
            char* const target = to.strip(at / strips_h, at % strips_h);
            const char* const source = from.strip(at / strips_h, at % strips_h);
            for (int64_t i = 0; i < to.count(); ++i)
                for (int64_t j = 0; j < from.count(); ++j)
                    memcpy(target + to.offsets[i] + j * chunk, source + from.offsets[j] + i * chunk, chunk);
        }
    }
};

// The same for chunks that fit a register, a cache line of the target at a time; past the cache when `Streamed`.
template <class Chunk, bool Streamed>
struct Transpose {
    static constexpr int64_t kSize = sizeof(Chunk), kLine = 64 / kSize, kWord = 8 / kSize;

    const Lines &to, &from;
    int64_t strips_h;

    TUBELET_HD void operator()(int64_t begin, int64_t end) const {
        for (int64_t at = begin; at < end; ++at)
            strip(to.strip(at / strips_h, at % strips_h), from.strip(at / strips_h, at % strips_h));
        if (Streamed) fence();
    }

    // Target lines are cut where their cache lines begin, so a block starts up to a cache line before `block`.
    TUBELET_HD void strip(char* target, const char* source) const {
        const char* columns[2 * kLine];  // columns [block - kLine, block + kLine)
        for (int64_t block = 0; block < from.count() + kLine; block += kLine) {
            for (int64_t j = std::max<int64_t>(0, block - kLine); j < std::min(from.count(), block + kLine); ++j) {
                columns[j - block + kLine] = source + from.offsets[j];
                if (from.prefetched) prefetch(columns[j - block + kLine], kPrefetchedBytes);
            }
            for (int64_t i = 0; i < to.count(); ++i) {
                char* const line = target + to.offsets[i];
                const int64_t shift = shift_of(line);
                const int64_t j = block - shift;
                const char* const* column = columns + kLine - shift;
                if (j >= 0 && j + kLine <= from.count()) {
                    if (i + 4 <= to.count() && four(&to.offsets[i], target, shift, j, column, i * kSize))
                        i += 3;
                    else
                        whole(line + j * kSize, column, i * kSize);
                } else
                    for (int64_t k = std::max<int64_t>(0, -j); k < std::min(kLine, from.count() - j); ++k)
                        memcpy(line + (j + k) * kSize, column[k] + i * kSize, kSize);
            }
        }
    }

    TUBELET_HD static int64_t shift_of(const char* line) {
        return Streamed ? reinterpret_cast<uintptr_t>(line) / kSize % kLine : 0;
    }

    // Four lines at once in registers, where their cache lines begin alike: false when this is not so.
    TUBELET_HD static bool four(const int64_t* offsets, char* target, int64_t shift, int64_t j,
                                const char* const* column, int64_t at) {
#if TUBELET_X86
        if (kSize != 4) return false;
        for (int i = 1; i < 4; ++i)
            if (shift_of(target + offsets[i]) != shift) return false;
        __m128 words[4][4];  // [line][part of its cache line]
        for (int part = 0; part < 4; ++part) {
            __m128 rows[4];
            for (int i = 0; i < 4; ++i)
                rows[i] = _mm_loadu_ps(reinterpret_cast<const float*>(column[4 * part + i] + at));
            _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
            for (int i = 0; i < 4; ++i) words[i][part] = rows[i];
        }
        for (int i = 0; i < 4; ++i)
            for (int part = 0; part < 4; ++part) {
                float* const to = reinterpret_cast<float*>(target + offsets[i] + j * kSize) + 4 * part;
                Streamed ? _mm_stream_ps(to, words[i][part]) : _mm_storeu_ps(to, words[i][part]);
            }
        return true;
#else
        return false;
#endif
    }

    TUBELET_HD static void whole(char* line, const char* const* column, int64_t at) {
        for (int64_t k = 0; k < kLine; k += 2 * kWord)
            store_words<Streamed>(line + k * kSize, word(column + k, at), word(column + k + kWord, at));
    }

    TUBELET_HD static uint64_t word(const char* const* column, int64_t at) {
        uint64_t word = 0;
        for (int64_t part = 0; part < kWord; ++part) {
            Chunk chunk;
            memcpy(&chunk, column[part] + at, kSize);
            word |= uint64_t(chunk) << 8 * kSize * part;
        }
        return word;
    }
};

template <class Chunk>
void transpose_by(const Lines& to, const Lines& from, const Patching& p) {
    const int64_t strips = p.t * p.h, bytes = p.w * p.runs() * int64_t(sizeof(Chunk));
    if (strips * bytes > kStreamedBytes && to.aligned(sizeof(Chunk)))
        parallel(strips, bytes, Transpose<Chunk, true>{to, from, p.h});
    else
        parallel(strips, bytes, Transpose<Chunk, false>{to, from, p.h});
}

void transpose(const Lines& to, const Lines& from, const Patching& p, int64_t size) {
    const int64_t chunk = p.pw * size;
    switch (chunk) {
        case 2:
            return transpose_by<uint16_t>(to, from, p);
        case 4:
            return transpose_by<uint32_t>(to, from, p);
        case 8:
            return transpose_by<uint64_t>(to, from, p);
        default:
            return parallel(p.t * p.h, p.w * p.runs() * chunk, TransposeAny{to, from, p.h, chunk});
    }
}

}  // namespace

void launch_pack(const Packing& packing) {
    transpose(token_lines(packing), latent_lines(packing), packing.patching, packing.size);
}

void launch_unpack(const Packing& packing) {
    transpose(latent_lines(packing), token_lines(packing), packing.patching, packing.size);
}

}  // namespace tubelet
