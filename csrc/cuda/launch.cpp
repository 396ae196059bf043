#include "launch.h"

#include <algorithm>

namespace tubelet::cuda {
namespace {

constexpr int64_t kMaxBlocks = 4096;  // several for each place on the largest GPU; threads stride over what is left
constexpr int64_t kAccess = 16;       // bytes

struct Threads {
    int64_t x, y;
};

template <class Arguments>
Launch launch(const std::string& symbol, Threads needed, Threads block, const Arguments& arguments) {
    const auto blocks = [](int64_t threads, int64_t size, int64_t most) {
        return std::clamp<int64_t>((threads + size - 1) / size, 1, most);
    };
    const int64_t x = blocks(needed.x, block.x, kMaxBlocks), y = blocks(needed.y, block.y, kMaxBlocks / x);
    return {symbol,
            {uint32_t(x), uint32_t(y), 1},
            {uint32_t(block.x), uint32_t(block.y), 1},
            std::string(reinterpret_cast<const char*>(&arguments), sizeof arguments)};
}

// Whether an address or a distance in bytes keeps accesses aligned; null does.
bool aligned(int64_t distance) { return distance % kAccess == 0; }
bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kAccess == 0; }

std::string name(const char* operation, const std::string& element, int64_t count) {
    return std::string("tubelet_") + operation + "_" + element + "x" + std::to_string(count);
}

Launch transpose(const char* operation, const Packing& packing) {
    const Patching& p = packing.patching;
    constexpr Threads block = {8, 16};  // a warp reads and writes at least 64 bytes of each line
    const int64_t run = p.pw * packing.size, tokens = p.t * p.h * p.w;
    if (kAccess % run == 0 && aligned(packing.tokens) && aligned(packing.latent) &&
        aligned(packing.stride * packing.size) && aligned(p.w * run) && aligned(p.runs() * run)) {
        const int64_t side = kAccess / run;
        return launch(name(operation, std::to_string(8 * run), side), {p.runs() / side, tokens / side}, block, packing);
    }
    return launch(name(operation, std::to_string(8 * packing.size), 1), {p.values(), tokens}, block, packing);
}

}  // namespace

Launch launch_rope3d(const RopeTable& table) {
    const int64_t count = aligned(table.cos) && aligned(table.sin) && table.pairs() % 4 == 0 ? 4 : 1;
    return launch(name("rope3d", "f32", count), {table.pairs() / count, table.tokens()}, {16, 16}, table);
}

Launch launch_pack(const Packing& packing) { return transpose("pack", packing); }

Launch launch_unpack(const Packing& packing) { return transpose("unpack", packing); }

Launch launch_guided_step(const GuidedStep& step) {
    const int64_t size = step.dtype == DType::f32 ? 4 : 2;
    bool fits = aligned(step.width * size) && aligned(step.velocity) && aligned(step.tokens) &&
                aligned(step.token_stride * size) && aligned(step.batch_stride * size) && aligned(step.clean) &&
                aligned(step.noise);
    for (int row = 0; row < step.buffers; ++row) fits = fits && aligned(step.state[row]);
    const int64_t count = fits ? kAccess / size : 1;
    const char* const dtype = step.dtype == DType::f32 ? "f32" : step.dtype == DType::f16 ? "f16" : "bf16";
    return launch(name("guided_step", dtype, count), {step.count * step.width / count, 1}, {256, 1}, step);
}

}  // namespace tubelet::cuda
