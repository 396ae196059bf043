// How the CPU kernels run: split over threads, compiled for two instruction sets, stored past the cache when large.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "element.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TUBELET_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace tubelet {

constexpr int64_t kThreadedBytes = int64_t(1) << 18;  // below, waking threads costs more than they save
constexpr int64_t kChunkBytes = int64_t(1) << 18;     // a thread's portion: small, so that a busy core gets fewer
constexpr int64_t kStreamedBytes = int64_t(1) << 24;  // above, a result would leave the cache before it is read
constexpr int64_t kPrefetchedBytes = 2048;            // how far ahead: further, and the first cache overflows

#if TUBELET_X86
template <class Body>
__attribute__((target("avx2"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}
#endif

// `body` must be an always-inline functor: it is compiled here once for each instruction set.
template <class Body>
void run(const Body& body, int64_t begin, int64_t end) {
#if TUBELET_X86
    static const bool avx2 = __builtin_cpu_supports("avx2");
    if (avx2) return run_avx2(body, begin, end);
#endif
    body(begin, end);
}

// How many threads a kernel may use; 0: as many as there are cores.
inline std::atomic<int> thread_limit{0};

inline int threads() {
#if defined(_OPENMP)
    const int limit = thread_limit;
    return limit > 0 ? limit : omp_get_max_threads();
#else
    return 1;
#endif
}

// Calls body(begin, end) on portions of [0, units), each unit moving `unit_bytes`, from several threads.
template <class Body>
void parallel(int64_t units, int64_t unit_bytes, const Body& body) {
    const int64_t step = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, unit_bytes));
    const int64_t chunks = (units + step - 1) / step;
#pragma omp parallel for schedule(dynamic) num_threads(threads()) if (units * unit_bytes > kThreadedBytes)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(body, chunk * step, std::min(units, (chunk + 1) * step));
}

// memcpy that does not pull the destination into the cache. `fence` makes such stores visible to other threads.
TUBELET_HD void stream(void* destination, const void* source, int64_t bytes) {
#if TUBELET_X86
    char* to = static_cast<char*>(destination);
    const char* from = static_cast<const char*>(source);
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 15);
    memcpy(to, from, head);
    int64_t at = head;
    for (; at + 16 <= bytes; at += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
    memcpy(to + at, from + at, bytes - at);
#else
    memcpy(destination, source, bytes);
#endif
}

// Stores 16 bytes; `Streamed` ones must be aligned.
template <bool Streamed>
TUBELET_HD void store_words(void* destination, uint64_t low, uint64_t high) {
#if TUBELET_X86
    const __m128i both = _mm_set_epi64x(int64_t(high), int64_t(low));
    if (Streamed) return _mm_stream_si128(static_cast<__m128i*>(destination), both);
#endif
    memcpy(destination, &low, sizeof low);
    memcpy(static_cast<char*>(destination) + sizeof low, &high, sizeof high);
}

// Asks for the 128 bytes that lie `ahead` of an address, which may be no one's.
TUBELET_HD void prefetch(const void* address, int64_t ahead) {
#if TUBELET_X86
    const uintptr_t at = reinterpret_cast<uintptr_t>(address) + uintptr_t(ahead);
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(at + 64), _MM_HINT_T0);
#endif
}

// ---- number formats by the block: `to` and `from` hold `size` values ----

template <class T>
TUBELET_HD void convert(float* to, const T* from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

template <class T>
TUBELET_HD void convert(T* to, const float* from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = from_float<T>(from[i]);
}

#if TUBELET_X86
// The processor's own conversion: bit for bit the portable one, but that a NaN keeps its payload.
inline bool has_f16c() {
    static const bool f16c = [] {
        unsigned a, b, c = 0, d;
        return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    }();
    return f16c;
}

__attribute__((target("avx,f16c"))) inline int64_t convert_f16c(float* to, const Half* from, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    return i;
}

__attribute__((target("avx,f16c"))) inline int64_t convert_f16c(Half* to, const float* from, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return i;
}

TUBELET_HD void convert(float* to, const Half* from, int64_t size) {
    for (int64_t i = has_f16c() ? convert_f16c(to, from, size) : 0; i < size; ++i) to[i] = to_float(from[i]);
}

TUBELET_HD void convert(Half* to, const float* from, int64_t size) {
    for (int64_t i = has_f16c() ? convert_f16c(to, from, size) : 0; i < size; ++i) to[i] = from_float<Half>(from[i]);
}
#endif

TUBELET_HD void fence() {
#if TUBELET_X86
    _mm_sfence();
#endif
}

}  // namespace tubelet
