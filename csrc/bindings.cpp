// Python sees checked operations on NumPy arrays (anything with DLPack or a buffer works); bfloat16 arrives as uint16.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

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
    static const char* const names[] = {"state[0]", "state[1]", "state[2]", "state[3]", "state[4]", "state"};
    std::vector<Out> buffers;
    std::vector<tubelet::Array> arrays;
    for (nb::handle buffer : state) {
        buffers.emplace_back(names[std::min<size_t>(buffers.size(), tubelet::kMaxBuffers)], buffer);
        arrays.push_back(buffers.back().array);
    }
    const In v("velocity", velocity), m("matrix", matrix);
    const Out to("tokens", tokens);
    const OptionalIn k("known", known), c("clean", clean), n("noise", noise);
    nb::gil_scoped_release released;
    tubelet::launch_guided_step(tubelet::guided_step(arrays, v.array, to.array, m.array, guidance, k.array, c.array,
                                                     n.array, clean_scale, noise_scale));
}

}  // namespace

NB_MODULE(_kernels, module) {
#if defined(_OPENMP)
    module.attr("THREADED") = true;
#else
    module.attr("THREADED") = false;
#endif
    module.def("set_threads", &tubelet::set_threads, "limit"_a);
    module.def("rope3d", &rope3d, "cos"_a, "sin"_a, "grid"_a, "head_dim"_a, "theta"_a, "offset"_a, "ntk"_a);
    module.def("pack", &pack, "tokens"_a, "latent"_a, "patch"_a);
    module.def("unpack", &unpack, "latent"_a, "tokens"_a, "patch"_a);
    module.def("guided_step", &guided_step, "state"_a, "velocity"_a, "tokens"_a, "matrix"_a, "guidance"_a,
               "known"_a.none(), "clean"_a.none(), "noise"_a.none(), "clean_scale"_a, "noise_scale"_a);
}
