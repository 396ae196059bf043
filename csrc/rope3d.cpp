// The rotary table of a token grid: each axis is tabulated once, then every token gathers its three pieces.
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace tubelet {
namespace {

struct AxisTable {
    int64_t pairs;
    std::vector<float> cos, sin;  // [size, pairs]

    explicit AxisTable(const RopeAxis& axis) : pairs(axis.pairs) {
        cos.reserve(axis.size * pairs);
        sin.reserve(axis.size * pairs);
        for (int64_t position = 0; position < axis.size; ++position)
            for (int64_t column = 0; column < pairs; ++column) {
                const Rotation turn = rotation(rope_angle(axis, position, rope_frequency(axis, column)));
                cos.push_back(turn.cos);
                sin.push_back(turn.sin);
            }
    }
};

struct Gather {
    float *cos, *sin;
    int64_t h, w;
    const AxisTable (&tables)[3];

    TUBELET_HD void operator()(int64_t begin, int64_t end) const {
        const int64_t pairs = tables[0].pairs + tables[1].pairs + tables[2].pairs;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t position[3] = {token / w / h, token / w % h, token % w};
            int64_t at = token * pairs;
            for (int axis = 0; axis < 3; ++axis) {
                const AxisTable& table = tables[axis];
                const int64_t row = position[axis] * table.pairs;
                std::copy_n(table.cos.data() + row, table.pairs, cos + at);
                std::copy_n(table.sin.data() + row, table.pairs, sin + at);
                at += table.pairs;
            }
        }
    }
};

}  // namespace

void set_threads(int limit) { thread_limit = limit; }

void launch_rope3d(const RopeTable& table) {
    const RopeAxis(&axes)[3] = table.axes;
    const AxisTable tables[3] = {AxisTable(axes[0]), AxisTable(axes[1]), AxisTable(axes[2])};
    parallel(table.tokens(), 2 * table.pairs() * int64_t(sizeof(float)),
             Gather{table.cos, table.sin, axes[1].size, axes[2].size, tables});
}

}  // namespace tubelet
