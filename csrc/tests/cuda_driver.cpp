// As much of NVIDIA's driver as runtime/cuda.py calls, on host memory and with the kernels as host code: built as
// libcuda.so.1, it stands for a GPU, so that the tests for GPUs run through cuda-python on any machine.
//
// It is strict: queued work waits until the stream is waited for, every call but the first few needs a context, and a
// thread that captures a stream in any mode but the relaxed one breaks the capture when it allocates or frees memory.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kInvalidContext = 201,
    kNotFound = 500,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901
};
enum Attribute { kMajor = 75, kMinor = 76 };
enum CaptureMode { kRelaxed = 2 };

using Work = std::vector<std::function<void()>>;
struct Stream {
    Work queue;
    bool capturing = false, broken = false;
};

constexpr size_t kMemory = size_t(1) << 28, kAlignment = 256;
std::map<uintptr_t, size_t> buffers;
std::vector<std::string> symbols;  // kernels that were asked for; a handle is 1 + the index
int context;
thread_local void* current = nullptr;
thread_local Stream* strict = nullptr;  // that this thread captures, in another mode than the relaxed one

size_t used() {
    size_t sum = 0;
    for (const auto& [address, size] : buffers) sum += size;
    return sum;
}

bool inside(uintptr_t address, size_t size) {
    const auto after = buffers.upper_bound(address);
    return after != buffers.begin() && address + size <= std::prev(after)->first + std::prev(after)->second;
}

// Whether the thread captures a stream that a call like this one breaks, and with it the capture.
bool breaks_capture() {
    if (strict) strict->broken = true;
    return strict;
}

Result enqueue(Stream* stream, std::function<void()> work) {
    if (current != &context) return kInvalidContext;
    stream->queue.push_back(std::move(work));
    return kSuccess;
}

}  // namespace

EXPORT int cuInit(unsigned) { return kSuccess; }

EXPORT int cuGetErrorName(int, const char** name) { return *name = "an error", kSuccess; }

EXPORT int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? kSuccess : kInvalidValue; }

EXPORT int cuDeviceGetName(char* name, int length, int) {
    return std::strncpy(name, "host memory", size_t(length)), kSuccess;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == kMajor ? 9 : 0;
    return attribute == kMajor || attribute == kMinor ? kSuccess : kInvalidValue;
}

EXPORT int cuDevicePrimaryCtxRetain(void** result, int) { return *result = &context, kSuccess; }

EXPORT int cuDevicePrimaryCtxRelease(int) { return kSuccess; }

EXPORT int cuCtxSetCurrent(void* chosen) { return current = chosen, kSuccess; }

EXPORT int cuMemGetInfo(size_t* free, size_t* total) {
    *free = kMemory - used();
    *total = kMemory;
    return current == &context ? kSuccess : kInvalidContext;
}

EXPORT int cuMemAlloc(uintptr_t* address, size_t size) {
    if (current != &context) return kInvalidContext;
    if (size == 0) return kInvalidValue;
    if (breaks_capture()) return kCaptureUnsupported;
    if (size > kMemory - used()) return kOutOfMemory;
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, size)) return kOutOfMemory;
    *address = reinterpret_cast<uintptr_t>(memory);
    buffers[*address] = size;
    return kSuccess;
}

EXPORT int cuMemFree(uintptr_t address) {
    if (breaks_capture()) return kCaptureUnsupported;
    if (current != &context || !buffers.erase(address)) return kInvalidValue;
    std::free(reinterpret_cast<void*>(address));
    return kSuccess;
}

EXPORT int cuStreamCreate(Stream** stream, unsigned) { return *stream = new Stream, kSuccess; }

EXPORT int cuStreamDestroy(Stream* stream) { return delete stream, kSuccess; }

EXPORT int cuStreamSynchronize(Stream* stream) {
    if (current != &context) return kInvalidContext;
    if (stream->capturing) return stream->broken = true, kCaptureUnsupported;
    for (const auto& work : stream->queue) work();
    stream->queue.clear();
    return kSuccess;
}

EXPORT int cuMemcpyHtoDAsync(uintptr_t to, const void* from, size_t size, Stream* stream) {
    if (!inside(to, size)) return kInvalidValue;
    return enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, size); });
}

EXPORT int cuMemcpyDtoHAsync(void* to, uintptr_t from, size_t size, Stream* stream) {
    if (!inside(from, size)) return kInvalidValue;
    return enqueue(stream, [=] { std::memcpy(to, reinterpret_cast<const void*>(from), size); });
}

EXPORT int cuMemcpyDtoDAsync(uintptr_t to, uintptr_t from, size_t size, Stream* stream) {
    if (!inside(to, size) || !inside(from, size)) return kInvalidValue;
    return enqueue(stream,
                   [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size); });
}

EXPORT int cuLibraryLoadData(void** library, const void* code, const int*, void**, unsigned, const int*, void**,
                             unsigned) {
    constexpr uint32_t kFatbin = 0xBA55ED50;  // how every fatbin begins
    *library = &context;
    return std::memcmp(code, &kFatbin, sizeof kFatbin) ? kInvalidValue : kSuccess;
}

EXPORT int cuLibraryUnload(void*) { return kSuccess; }

EXPORT int cuLibraryGetKernel(uintptr_t* kernel, void*, const char* symbol) {
    if (!tubelet_cuda_host_arguments(symbol)) return kNotFound;
    symbols.push_back(symbol);
    return *kernel = symbols.size(), kSuccess;
}

EXPORT int cuKernelGetFunction(uintptr_t* function, uintptr_t kernel) { return *function = kernel, kSuccess; }

EXPORT int cuLaunchKernel(uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned, Stream* stream, void** parameters, void**) {
    if (!gx || !gy || !gz || gy > 65535 || bx * by * bz > 1024) return kInvalidValue;
    const std::string symbol = symbols.at(function - 1);
    const std::string arguments(static_cast<const char*>(parameters[0]), tubelet_cuda_host_arguments(symbol.c_str()));
    return enqueue(stream, [=] {
        const uint32_t grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        tubelet_cuda_host_launch(symbol.c_str(), grid, block, arguments.data());
    });
}

EXPORT int cuStreamBeginCapture(Stream* stream, int mode) {
    if (!stream->queue.empty()) cuStreamSynchronize(stream);
    if (mode != kRelaxed) strict = stream;
    return stream->capturing = true, kSuccess;
}

EXPORT int cuStreamEndCapture(Stream* stream, Work** graph) {
    Work captured = std::exchange(stream->queue, {});
    strict = nullptr;
    stream->capturing = false;
    if (std::exchange(stream->broken, false)) return *graph = nullptr, kCaptureInvalidated;
    return *graph = new Work(std::move(captured)), kSuccess;
}

EXPORT int cuGraphInstantiateWithFlags(Work** executable, const Work* graph, unsigned long long) {
    return *executable = new Work(*graph), kSuccess;
}

EXPORT int cuGraphDestroy(Work* graph) { return delete graph, kSuccess; }

EXPORT int cuGraphExecDestroy(Work* executable) { return delete executable, kSuccess; }

EXPORT int cuGraphLaunch(const Work* executable, Stream* stream) {
    return enqueue(stream, [copy = *executable] {
        for (const auto& work : copy) work();
    });
}

// How cuda-python finds all others: by their names without version.
EXPORT int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int* status) {
    static void* const self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(self, symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? kSuccess : kNotFound;
}
