// The passes around products that a library made: bias + activation, its backward, dropout +
// residual.
//
//   h = product + b1       a = drop(act(h))
//   dh = drop(da) act'(h)  db1 = the sum of dh's rows      a again
//
// Each reads and writes every matrix once; the rows of a block share sums of db1 that stay in L1.
//
// Compiled once per instruction set.

#include "common/cpu/pages.h"

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/activation.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

template <class T>
void bias_activation(const BiasActivationParams& p, const Parallel& parallel) {
  const Drop drop(p.dropout, kHidden);
  prefer_large_pages(p.out, size_t(p.M * p.F) * sizeof(T));
  with_activation(p.activation, [&](auto constant) BIGKERN_FN {
    constexpr Activation A = decltype(constant)::value;
    const int64_t F = p.F, width = is_gated(A) ? 2 * F : F;
    const T* bias = static_cast<const T*>(p.bias);
    parallel.for_range(0, p.M, row_grain(width), [&](int64_t begin, int64_t end) BIGKERN_FN {
      for (int64_t i = begin; i < end; ++i) {
        const T* product = static_cast<const T*>(p.product) + i * width;
        T* pre = p.preactivation ? static_cast<T*>(p.preactivation) + i * width : nullptr;
        T* out = static_cast<T*>(p.out) + i * F;
        const auto h = [&](int64_t j, auto n) BIGKERN_FN {
          const vf sum = load_upto(product + j, n) + load_or(bias, j, n, 0.0f);
          if (pre) store_upto(pre + j, sum, n);
          return round_to<T>(sum);
        };
        each_vector(F, [&](int64_t f, auto n) BIGKERN_FN {
          vf value = value_of<A>(h(f, n));
          if constexpr (is_gated(A)) value *= h(F + f, n);
          store_upto(out + f, drop(value, i, f), n);
        });
      }
    });
  });
}

template <class T>
void bias_activation_backward(const BiasActivationBackwardParams& p, const Parallel& parallel) {
  const int64_t F = p.F, width = is_gated(p.activation) ? 2 * F : F, blocks = row_sum_blocks(p.M);
  const ActivationBackward<T> at = {F, static_cast<const T*>(p.preactivation),
                                    static_cast<T*>(p.dpre), static_cast<T*>(p.out),
                                    Drop(p.dropout, kHidden)};
  float* partial = static_cast<float*>(p.workspace);  // [blocks, width]
  prefer_large_pages(p.dpre, size_t(p.M * width) * sizeof(T));
  if (p.out) prefer_large_pages(p.out, size_t(p.M * F) * sizeof(T));
  with_activation(p.activation, [&](auto constant) BIGKERN_FN {
    constexpr Activation A = decltype(constant)::value;
    parallel.for_range(0, blocks, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
      for (int64_t b = begin; b < end; ++b) {
        const Slice rows = slice_of(p.M, 1, b, blocks);
        float* sums = p.dbias ? partial + b * width : nullptr;
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          const T* dout = static_cast<const T*>(p.dout) + i * F;
          const bool first = i == rows.begin;
          each_vector(F, [&](int64_t f, auto n) BIGKERN_FN {
            const HiddenGradient d = at.template run<A>(load_upto(dout + f, n), i, f, n);
            accumulate(sums, f, d.gate, n, first);
            if constexpr (is_gated(A)) accumulate(sums, F + f, d.up, n, first);
          });
        }
      }
    });
  });
  add_partial_sums(partial, blocks, width, width, static_cast<T*>(p.dbias), parallel);
}

template <class T>
void dropout_add(const DropoutAddParams& p, const Parallel& parallel) {
  const Drop drop(p.dropout, kOutput);
  prefer_large_pages(p.out, size_t(p.M * p.N) * sizeof(T));
  parallel.for_range(0, p.M, row_grain(p.N), [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * p.N;
      const T* x = static_cast<const T*>(p.x) + at;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
      T* out = static_cast<T*>(p.out) + at;
      each_vector(p.N, [&](int64_t j, auto n) BIGKERN_FN {
        const vf kept = drop(load_upto(x + j, n), i, j);
        store_upto(out + j, kept + load_or(residual, j, n, 0.0f), n);
      });
    }
  });
}

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
