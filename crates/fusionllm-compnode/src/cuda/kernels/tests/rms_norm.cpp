#include "check.h"
#include "../rms_norm.cu"

// Rows that a block of the kernel for narrow rows takes; 0 where rows are not narrow.
template <class T> u32 narrow_rows(u32 dim) {
    return dim % Per16<T>::n || dim > 32 * Per16<T>::n ? 0 : 256 / lanes_of_row<T>(dim);
}
// 1 / the root of the mean square of a row, in double.
template <class T> double scale_of(const Tensor<T>& x, size_t at, u32 dim, float eps) {
    double squares = 0;
    for (u32 c = 0; c < dim; c++) squares += x.at(at + c) * x.at(at + c);
    return 1 / sqrt(squares / dim + eps);
}
template <class T> void forward(u32 rows, u32 dim) {
    const size_t n = (size_t)rows * dim;
    Tensor<T> x(n, 2.f), residual(n, 2.f);
    Tensor<float> weight(dim, 1.f);
    const float eps = 1e-5f;
    // Alone; with a residual; its sum over x; its sum not wanted, nor the scales. All by both kernels.
    for (int kind = 0; kind < 8; kind++) {
        const bool narrow = kind >= 4, wanted = kind % 4 != 3;
        if (narrow && !narrow_rows<T>(dim)) break;
        Tensor<T> v(n), sum(n), out(n), in = x.copy();
        for (size_t i = 0; i < n; i++)
            v.set(i, kind % 4 == 0 ? x.at(i) : round_to<T>((float)x.at(i) + (float)residual.at(i)));
        Tensor<float> rstd(rows);
        T *added = kind % 4 ? residual.data() : nullptr,
          *to = kind % 4 == 1 ? sum.data() : kind % 4 == 2 ? in.data() : nullptr;
        float* scales = wanted ? rstd.data() : nullptr;
        if (narrow)
            RUN(rms_norm_narrow, T, blocks(rows, narrow_rows<T>(dim)), 1, in.data(), added, to, weight.data(), nullptr,
                out.data(), nullptr, scales, rows, dim, eps);
        else
            RUN(rms_norm, T, blocks(rows, 8), 1, in.data(), added, to, weight.data(), nullptr, out.data(), nullptr,
                scales, rows, dim, eps);
        const std::string name = named<T>(narrow ? "rms_norm_narrow" : "rms_norm");
        compare(
            name, out,
            [&](size_t i) { return v.at(i) * scale_of(v, i / dim * dim, dim, eps) * weight.at(i % dim); },
            bound<T>(5e-6));
        if (kind % 4 == 1 || kind % 4 == 2)
            compare(name + " sum", kind % 4 == 1 ? sum : in, [&](size_t i) { return v.at(i); }, 0.);
        if (wanted) compare(name + " rstd", rstd, [&](size_t r) { return scale_of(v, r * dim, dim, eps); }, 5e-6);
    }
}
template <class T> void backward(u32 rows, u32 dim, u32 rows_per_block) {
    const size_t n = (size_t)rows * dim;
    const u32 parts = blocks(rows, rows_per_block);
    Tensor<T> x(n, 2.f), dy(n, 2.f), addend(n, 2.f);
    Tensor<float> weight(dim, 1.f), rstd(rows);
    std::vector<double> dx(n), dw((size_t)parts * dim);
    for (u32 r = 0; r < rows; r++) {
        rstd.set(r, scale_of(x, (size_t)r * dim, dim, 1e-5f));
        const double scale = rstd.at(r);
        double along = 0;
        for (size_t i = (size_t)r * dim; i < (size_t)(r + 1) * dim; i++) {
            along += dy.at(i) * weight.at(i % dim) * x.at(i) * scale;
            dw[(size_t)(r / rows_per_block) * dim + i % dim] += dy.at(i) * x.at(i) * scale;
        }
        for (size_t i = (size_t)r * dim; i < (size_t)(r + 1) * dim; i++)
            dx[i] = scale * (dy.at(i) * weight.at(i % dim) - x.at(i) * scale * along / dim);
    }
    for (int kind = 0; kind < 4; kind++) {  // alone, or over dy with an addend; by both kernels
        const bool narrow = kind >= 2, with = kind % 2;
        if (narrow && !narrow_rows<T>(dim)) break;
        Tensor<T> source = dy.copy(), apart(n), &out = with ? source : apart;
        Tensor<float> partial((size_t)parts * dim);
        T* added = with ? addend.data() : nullptr;
        if (narrow)
            RUN(rms_norm_narrow_grad, T, parts, 1, source.data(), x.data(), weight.data(), nullptr, rstd.data(), added,
                out.data(), partial.data(), rows, dim, rows_per_block);
        else
            RUN(rms_norm_grad, T, parts, 1, source.data(), x.data(), weight.data(), nullptr, rstd.data(), added,
                out.data(), partial.data(), rows, dim, rows_per_block);
        const std::string name = named<T>(narrow ? "rms_norm_narrow_grad" : "rms_norm_grad");
        compare(name, out, [&](size_t i) { return dx[i] + (with ? addend.at(i) : 0); }, bound<T>(1e-5));
        compare(name + " partial", partial, [&](size_t i) { return dw[i]; }, 1e-5);
    }
}
int main() {
    for (u32 dim : {1u, 5u, 8u, 16u, 24u, 64u, 100u, 128u, 256u, 513u, 768u, 1600u, 2048u, 4096u, 5000u}) {
        forward<float>(9, dim);
        forward<u16>(9, dim);
        backward<float>(19, dim, 8);
        backward<u16>(19, dim, 8);
    }
    for (u32 dim : {8u, 64u, 72u, 128u})
        for (u32 rows : {1u, 33u, 500u}) {
            forward<float>(rows, dim);
            forward<u16>(rows, dim);
            backward<float>(rows, dim, 300);
            backward<u16>(rows, dim, 300);
        }
    forward<u16>(1, 16384);
    backward<float>(3, 16384, 2);
    backward<u16>(3, 16384, 2);
    backward<u16>(5, 6144, 2);
    return report();
}
