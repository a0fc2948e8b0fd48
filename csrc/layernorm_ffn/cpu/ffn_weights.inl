// The weights of the FFN block as panels: packed when they are used, or once for all.
//
//   W [N, K], K contiguous           panels, [K][NR] each, NR = 2 W lanes
//   +---------------+  rows j ..     +----+----+----+
//   |               |  j + NR are    |    |    |    |    ungated: NR rows of W side by side
//   |               |  one panel     | 0  | 1  | 2  | K  gated: W gates, then the W rows of `up`
//   |               |  ---------->   |    |    |    |           that belong to them, so that one
//   +---------------+                +----+----+----+           tile has both halves of W outputs
//
// Weights that change are packed by the thread that multiplies by them, right before it does.
// Frozen ones can be packed once (pack_weight), all of K in a panel and the panels in a row, in
// their own type: a word of two bf16 where words are pairs, else [K][NR] elements, which the inner
// loop widens in its registers. int8 is always [K][NR]: whether two steps make a word is the other
// operand's affair, so one packing serves every dtype of x.
//
// Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "layernorm_ffn/cpu/passes.inl"
#endif

namespace bigkern::layernorm_ffn::BIGKERN_ISA {
namespace {

// Columns of the product's C: the weight's rows, or gate and up interleaved in whole vectors.
inline int64_t product_columns(int64_t rows, bool gated) {
  return gated ? (rows / 2 + W - 1) / W * NR : rows;
}

// Words of T from n elements of a row of S: T itself, or int8.
template <class T, class S>
inline vf weight_words(const S* p, int64_t n) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return words_streamed(p, n);
  } else {
    __builtin_prefetch(p + 512);
    const auto values = [&](int64_t k, int64_t count)
                            BIGKERN_FN { return load_upto(p + k, count); };
    return words_along<T>(0, n, values);
  }
}

// Packs panels of words of T from a weight stored as S.
template <class T, class S>
struct PackWeight {
  const S* weight;
  int64_t rows, K;
  bool gated;

  void operator()(int64_t j, int64_t columns, int64_t begin, int64_t end, float* out) const {
    const int64_t half = gated ? rows / 2 : rows, first = gated ? j / 2 : j;
    const auto row = [&](int64_t i, int64_t k, int64_t n) BIGKERN_FN {
      const bool up = gated && i >= W;
      const int64_t at = first + (up ? i - W : i);
      if (at >= half) return zero();
      return weight_words<T>(weight + (up ? half + at : at) * K + k, n);
    };
    pack_rows<NR, T>(columns, begin, end, out, row);
  }
};

// ---- frozen -------------------------------------------------------------------------------------

// What a panel's elements are read as: a pair of bf16 is a word.
template <class S>
struct PanelElement {
  using type = S;
};
#if BIGKERN_LEVEL >= 3
template <>
struct PanelElement<bf16> {
  using type = float;
};
#endif

// Elements of one panel: an even number of steps, for whoever pairs them.
inline int64_t panel_elements(int64_t K) { return (K + 1) / 2 * 2 * NR; }

// The panels of S that pack_weight left at `panels`, as B of a product of T.
template <class S>
PanelMatrix<typename PanelElement<S>::type> frozen(const void* panels, int64_t K) {
  using Element = typename PanelElement<S>::type;
  const int64_t each = panel_elements(K) * int64_t(sizeof(S)) / int64_t(sizeof(Element));
  return {static_cast<const Element*>(panels), each};
}

// Widens frozen panels into words for all the tiles of a block of rows.
template <class T, class B>
struct WidenPanels {
  PanelMatrix<B> b;

  void operator()(int64_t j, int64_t, int64_t begin, int64_t end, float* out) const {
    constexpr int64_t step = step_of<paired<T>, B>;
    const B* panel = b.panels + j / NR * b.each + words_of<T>(begin) * step;
    for (int64_t left = words_of<T>(end - begin); left > 0; --left, panel += step, out += NR) {
      for (int64_t i = 0; i < NR; i += W) store(out + i, panel_words<paired<T>>(panel + i));
    }
  }
};

// A weight of the block.
struct Weight {
  const void *natural, *panels;  // panels null: not packed yet
  bool int8;
  int64_t rows, K;
  bool gated, transposed;  // in memory: [K, rows]
};

// Rows of x up to which panels narrower than words are widened tile by tile, in registers: measured
// with int8.
template <class T>
constexpr int64_t kWidenInRegisters = (paired<T> ? 2 : 8) * MR;

// Calls f with the weight as B of a product of T with M rows.
template <class T, class S, class F>
inline void with_stored(const Weight& w, int64_t M, const F& f) {
  if constexpr (sizeof(S) == sizeof(T)) {
    const Matrix<T> natural = {static_cast<const T*>(w.natural), 1, w.rows};
    if (w.transposed) return f(PackMatrix<NR, T>{natural});
  }
  if (!w.panels) {
    return f(PackWeight<T, S>{static_cast<const S*>(w.natural), w.rows, w.K, w.gated});
  }
  const auto panels = frozen<S>(w.panels, w.K);
  using Element = typename PanelElement<S>::type;
  if constexpr (sizeof(Element) < sizeof(float)) {
    if (M > kWidenInRegisters<T>) return f(WidenPanels<T, Element>{panels});
  }
  f(panels);
}
template <class T, class F>
inline void with_weight(const Weight& w, int64_t M, const F& f) {
  w.int8 ? with_stored<T, int8_t>(w, M, f) : with_stored<T, T>(w, M, f);
}

// Steps [begin, end) of the panel of columns j .. j + columns, narrowed to S again.
template <class S>
void pack_narrow(const PackWeight<S, S>& pack, int64_t j, int64_t columns, int64_t begin,
                 int64_t end, S* out) {
  alignas(64) float wide[kSlab * NR];
  pack(j, columns, begin, end, wide);
  for (int64_t i = 0; i < (end - begin) * NR; i += W) store(out + i, load(wide + i));
}

// One panel over all of K. Steps beyond K are zero.
template <class S>
void pack_panel_of(const PackWeight<S, S>& pack, int64_t j, int64_t columns, S* out) {
  for (int64_t k = 0; k < pack.K; k += kSlab) {
    const int64_t end = at_most(pack.K, k + kSlab);
    if constexpr (sizeof(S) == sizeof(float) || paired<S>) {
      pack(j, columns, k, end, reinterpret_cast<float*>(out + k * NR));
    } else {
      pack_narrow(pack, j, columns, k, end, out + k * NR);
    }
  }
  if (pack.K % 2 == 0 || paired<S>) return;
  for (int64_t i = 0; i < NR; i += W) store(out + pack.K * NR + i, zero());
}

template <class S>
void pack_weight(const PackWeightParams& p, const Parallel& parallel) {
  const PackWeight<S, S> pack = {static_cast<const S*>(p.weight), p.rows, p.columns, p.gated};
  const int64_t N = product_columns(p.rows, p.gated);
  parallel.for_range(0, (N + NR - 1) / NR, 1, [&](int64_t begin, int64_t end) BIGKERN_FN {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t j = panel * NR;
      S* out = static_cast<S*>(p.panels) + panel * panel_elements(p.columns);
      pack_panel_of(pack, j, at_most(N - j, NR), out);
    }
  });
}

}  // namespace
}  // namespace bigkern::layernorm_ffn::BIGKERN_ISA
