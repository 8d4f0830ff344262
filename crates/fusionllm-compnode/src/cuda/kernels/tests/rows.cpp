#include "check.h"
#include "../rows.cu"

void test(u32 dim) {
    u32 table = 9, rows[] = {1, 4, 8};
    Tensor<float> into((size_t)table * dim, 2.f), from((size_t)table * dim, 2.f), out((size_t)3 * dim);
    Tensor<u32> listed(3);
    for (u32 i = 0; i < 3; i++) listed.set(i, rows[i]);
    Tensor<float> sum = into.copy(), rest = from.copy();
    RUN_PLAIN(add_rows, 3, 1, sum.data(), rest.data(), listed.data(), dim);
    auto is_listed = [&](size_t i) { return i / dim == 1 || i / dim == 4 || i / dim == 8; };
    compare("add_rows into", sum, [&](size_t i) { return into.at(i) + (is_listed(i) ? from.at(i) : 0.); }, 1e-6);
    compare("add_rows from", rest, [&](size_t i) { return is_listed(i) ? 0. : from.at(i); }, 0.);
    Tensor<float> values((size_t)3 * dim, 2.f), more = into.copy();
    RUN_PLAIN(add_listed, 3, 1, more.data(), values.data(), listed.data(), dim);
    auto place = [&](size_t row) { return row == 1 ? 0 : row == 4 ? 1 : 2; };
    auto added = [&](size_t i) { return is_listed(i) ? values.at((size_t)place(i / dim) * dim + i % dim) : 0.; };
    compare("add_listed", more, [&](size_t i) { return into.at(i) + added(i); }, 1e-6);
    RUN_PLAIN(gather_rows, 3, 1, into.data(), listed.data(), out.data(), dim);
    compare("gather_rows", out, [&](size_t i) { return into.at((size_t)rows[i / dim] * dim + i % dim); }, 0.);
}
int main() {
    for (u32 dim : {1u, 127u, 128u, 300u}) test(dim);
    return report();
}
