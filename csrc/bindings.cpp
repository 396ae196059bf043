// Python sees checked operations on NumPy arrays (anything with DLPack or a buffer works), bfloat16 as uint16; and in
// the submodule `cuda` the same on device memory, which return what is to be launched.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

tubelet::DType dtype_of(nb::dlpack::dtype dtype) {
    if (dtype == nb::dtype<float>()) return tubelet::DType::f32;
    if (dtype.lanes != 1 || dtype.bits != 16) return tubelet::DType::other;
    switch (nb::dlpack::dtype_code(dtype.code)) {
        case nb::dlpack::dtype_code::Float:
            return tubelet::DType::f16;
        case nb::dlpack::dtype_code::Bfloat:
        case nb::dlpack::dtype_code::UInt:
            return tubelet::DType::bf16;
        default:
            return tubelet::DType::other;
    }
}

// A checked-operation argument together with the reference that keeps its memory alive.
template <class NdArray>
struct Argument {
    NdArray owner;
    tubelet::Array array{};

    Argument(const char* name, nb::handle value) {
        if (!nb::try_cast(value, owner, false))
            throw tubelet::ArgumentError(
                std::string(name) +
                (std::is_same_v<NdArray, Output> ? " must be a writable array" : " must be an array"));
        if (owner.ndim() > size_t(tubelet::Array::kMaxRank))
            throw tubelet::ArgumentError(std::string(name) + " must have at most 4 axes, has " +
                                         std::to_string(owner.ndim()));
        array.name = name;
        array.data = const_cast<void*>(static_cast<const void*>(owner.data()));
        array.dtype = dtype_of(owner.dtype());
        array.rank = int(owner.ndim());
        for (int i = 0; i < array.rank; ++i) {
            array.shape[i] = int64_t(owner.shape(i));
            array.stride[i] = owner.stride(i);
        }
    }
};
using In = Argument<Input>;
using Out = Argument<Output>;

struct OptionalIn {
    std::optional<In> argument;
    std::optional<tubelet::Array> array;

    OptionalIn(const char* name, nb::handle value) {
        if (!value.is_none()) array = argument.emplace(name, value).array;
    }
};

const char* state_name(size_t index) {
    static const char* const names[] = {"state[0]", "state[1]", "state[2]", "state[3]", "state[4]", "state"};
    return names[std::min<size_t>(index, tubelet::kMaxBuffers)];
}

void rope3d(nb::handle cos, nb::handle sin, tubelet::Triple grid, int64_t head_dim, double theta,
            tubelet::RealTriple offset, tubelet::RealTriple ntk) {
    const Out c("cos", cos), s("sin", sin);
    nb::gil_scoped_release released;
    tubelet::launch_rope3d(tubelet::rope3d(c.array, s.array, grid, head_dim, theta, offset, ntk));
}

void pack(nb::handle tokens, nb::handle latent, tubelet::Triple patch) {
    const Out to("tokens", tokens);
    const In from("latent", latent);
    nb::gil_scoped_release released;
    tubelet::launch_pack(tubelet::pack(to.array, from.array, patch));
}

void unpack(nb::handle latent, nb::handle tokens, tubelet::Triple patch) {
    const Out to("latent", latent);
    const In from("tokens", tokens);
    nb::gil_scoped_release released;
    tubelet::launch_unpack(tubelet::unpack(to.array, from.array, patch));
}

void guided_step(nb::sequence state, nb::handle velocity, nb::handle tokens, nb::handle matrix, double guidance,
                 nb::handle known, nb::handle clean, nb::handle noise, double clean_scale, double noise_scale) {
    std::vector<Out> buffers;
    std::vector<tubelet::Array> arrays;
    for (nb::handle buffer : state) {
        buffers.emplace_back(state_name(buffers.size()), buffer);
        arrays.push_back(buffers.back().array);
    }
    const In v("velocity", velocity), m("matrix", matrix);
    const Out to("tokens", tokens);
    const OptionalIn k("known", known), c("clean", clean), n("noise", noise);
    nb::gil_scoped_release released;
    tubelet::launch_guided_step(tubelet::guided_step(arrays, v.array, to.array, m.array, guidance, k.array, c.array,
                                                     n.array, clean_scale, noise_scale));
}

// ---- device memory ----

// Address, name of the dtype, shape and strides in elements.
using DeviceArray = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;

tubelet::Array array_of(const char* name, const DeviceArray& value) {
    const auto& [address, dtype, shape, strides] = value;
    if (shape.size() > size_t(tubelet::Array::kMaxRank) || shape.size() != strides.size())
        throw tubelet::ArgumentError(std::string(name) + " must have at most 4 axes, has " +
                                     std::to_string(shape.size()));
    tubelet::Array array{};
    array.name = name;
    array.data = reinterpret_cast<void*>(address);
    array.dtype = dtype == "float32"    ? tubelet::DType::f32
                  : dtype == "float16"  ? tubelet::DType::f16
                  : dtype == "bfloat16" ? tubelet::DType::bf16
                                        : tubelet::DType::other;
    array.rank = int(shape.size());
    std::copy(shape.begin(), shape.end(), array.shape);
    std::copy(strides.begin(), strides.end(), array.stride);
    return array;
}

std::optional<tubelet::Array> array_of(const char* name, const std::optional<DeviceArray>& value) {
    return value ? std::optional(array_of(name, *value)) : std::nullopt;
}

// (symbol, grid, block, arguments)
nb::tuple described(const tubelet::cuda::Launch& launch) {
    const auto dimensions = [](const auto& of) { return nb::make_tuple(of[0], of[1], of[2]); };
    return nb::make_tuple(launch.symbol, dimensions(launch.grid), dimensions(launch.block),
                          nb::bytes(launch.arguments.data(), launch.arguments.size()));
}

nb::tuple cuda_rope3d(const DeviceArray& cos, const DeviceArray& sin, tubelet::Triple grid, int64_t head_dim,
                      double theta, tubelet::RealTriple offset, tubelet::RealTriple ntk) {
    return described(tubelet::cuda::launch_rope3d(
        tubelet::rope3d(array_of("cos", cos), array_of("sin", sin), grid, head_dim, theta, offset, ntk)));
}

nb::tuple cuda_pack(const DeviceArray& tokens, const DeviceArray& latent, tubelet::Triple patch) {
    return described(
        tubelet::cuda::launch_pack(tubelet::pack(array_of("tokens", tokens), array_of("latent", latent), patch)));
}

nb::tuple cuda_unpack(const DeviceArray& latent, const DeviceArray& tokens, tubelet::Triple patch) {
    return described(
        tubelet::cuda::launch_unpack(tubelet::unpack(array_of("latent", latent), array_of("tokens", tokens), patch)));
}

nb::tuple cuda_guided_step(const std::vector<DeviceArray>& state, const DeviceArray& velocity,
                           const DeviceArray& tokens, nb::handle matrix, double guidance,
                           const std::optional<DeviceArray>& known, const std::optional<DeviceArray>& clean,
                           const std::optional<DeviceArray>& noise, double clean_scale, double noise_scale) {
    std::vector<tubelet::Array> buffers;
    for (const DeviceArray& buffer : state) buffers.push_back(array_of(state_name(buffers.size()), buffer));
    const In host_matrix("matrix", matrix);
    return described(tubelet::cuda::launch_guided_step(tubelet::guided_step(
        buffers, array_of("velocity", velocity), array_of("tokens", tokens), host_matrix.array, guidance,
        array_of("known", known), array_of("clean", clean), array_of("noise", noise), clean_scale, noise_scale)));
}

}  // namespace

NB_MODULE(_kernels, module) {
#if defined(_OPENMP)
    module.attr("THREADED") = true;
#else
    module.attr("THREADED") = false;
#endif
    module.def("set_threads", &tubelet::set_threads, "limit"_a);
    const auto define = [](nb::module_ to, auto rope3d, auto pack, auto unpack, auto guided_step) {
        to.def("rope3d", rope3d, "cos"_a, "sin"_a, "grid"_a, "head_dim"_a, "theta"_a, "offset"_a, "ntk"_a);
        to.def("pack", pack, "tokens"_a, "latent"_a, "patch"_a);
        to.def("unpack", unpack, "latent"_a, "tokens"_a, "patch"_a);
        to.def("guided_step", guided_step, "state"_a, "velocity"_a, "tokens"_a, "matrix"_a, "guidance"_a,
               "known"_a.none(), "clean"_a.none(), "noise"_a.none(), "clean_scale"_a, "noise_scale"_a);
    };
    define(module, &rope3d, &pack, &unpack, &guided_step);
    nb::module_ cuda = module.def_submodule("cuda");
    define(cuda, &cuda_rope3d, &cuda_pack, &cuda_unpack, &cuda_guided_step);
    cuda.attr("STEP_BYTES") = sizeof(tubelet::GuidedStep);
}
