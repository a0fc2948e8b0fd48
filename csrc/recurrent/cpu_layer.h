// The scan forward: at each step one product with the packed weights, and the cell on its tiles.
//
//   h' as panels      weights of a block of units       tiles, in L1
//   [K][height]       [K][NR] a gate, from L2 or L3     gates: [height][NR] each
//   +-----------+     +---+ +---+ +---+ +---+           +---+ +---+ +---+ +---+
//   | sequences |  x  | i | | f | | g | | o |     =     | i | | f | | g | | o |  -> cell -> h, c
//   +-----------+     +---+ +---+ +---+ +---+           +---+ +---+ +---+ +---+        |
//         ^                                                                            |
//         +------------------- transposed, into the other buffer ----------------------+
//
// h' has two buffers, so that a chain's threads wait for each other once a step. The fp32 state h,
// c is its thread's alone. Included once per instruction set; no include guard.

namespace bigkern::recurrent::BIGKERN_ISA {
namespace {

// The workspace of a scan, as floats from one address on.
template <class T>
struct ScanSpace {
  Layout<T> layout;
  int64_t row_panels;  // of all chains of both directions, whatever the sharing
  int threads;
  float* base;

  ScanSpace(const Sizes& of, int threads, void* workspace)
      : layout(of),
        row_panels(most_row_panels(of, threads)),
        threads(threads),
        base(static_cast<float*>(workspace)) {
    panels = base;
    states = panels + of.D * layout.panels();
    h = states + 2 * row_panels * layout.words * MR;
    c = h + of.D * of.B * layout.width();
    tiles = c + of.D * of.B * layout.width();
    end = tiles + threads * tiles_each();
  }
  int64_t tiles_each() const { return kPanels * kRowPanels * kTile; }
  size_t bytes() const { return size_t(end - base) * sizeof(float); }

  float* panels;  // [D][blocks][G][words][NR]: the weights
  float* states;  // [2] x row panels x [words][height]: h' and h, as words of T
  float *h, *c;   // [D, B, width]
  float* tiles;   // a thread: [kPanels][kRowPanels][MR][NR]
  float* end;
};

template <Mode mode, class T>
struct Forward {
  const Scan& p;
  const Chain& chain;
  const Layout<T>& layout;
  const float* panels;       // of the chain's direction
  float* states[2];          // [row panels][words][height]
  float *h_state, *c_state;  // of the chain's first sequence: [rows, width]
  float* tiles;

  static const T* in(const void* x) { return static_cast<const T*>(x); }
  static T* out(void* x) { return static_cast<T*>(x); }

  // Sequences from h0, c0: into both buffers, for those that join later find it in either.
  void begin() const {
    const Sizes& of = p.of;
    for (int64_t block = chain.first_block; block < chain.last_block; ++block) {
      for (int64_t row = 0; row < chain.rows; ++row) {
        const int64_t from = ((chain.direction * of.B) + chain.begin + row) * of.H + block * NR;
        for (int64_t v = 0; v < NR; v += W) {
          const int64_t n = layout.units(block) - v, to = row * layout.width() + block * NR + v;
          store(h_state + to, n > 0 ? load_upto(in(p.h0) + from + v, n) : zero());
          if (mode == Mode::lstm) {
            store(c_state + to, n > 0 ? load_upto(in(p.c0) + from + v, n) : zero());
          }
        }
      }
      for (float* state : states) {
        for (int64_t i = 0; i < chain.rows; i += chain.height) publish(block, i, state);
      }
    }
  }

  // The h of a row panel, from the fp32 state into the panels of the next product: of those that
  // have not joined yet, too.
  void publish(int64_t block, int64_t i, float* state) const {
    const float* h = h_state + i * layout.width() + block * NR;
    pack_state<T>(h, layout.width(), chain.rows - i, chain.height, layout.units(block),
                  state + i * layout.words + words_of<T>(block * NR) * chain.height);
  }

  void step(const Step& now, const Step& next, int parity) const {
    const int64_t rows = chain.present(now.rows), at_once = kPanels / layout.G;
    for (int64_t block = chain.first_block; block < chain.last_block; block += at_once) {
      const int64_t blocks = at_most(chain.last_block - block, at_once);
      for (int64_t first = 0; first < rows; first += kRowPanels * chain.height) {
        const int64_t last = at_most(rows, first + kRowPanels * chain.height);
        prefetch_gates(now, block, blocks, first, last);
        multiply_panels<T>(last - first, chain.height, layout.words,
                           states[parity] + first * layout.words,
                           panels + block * layout.G * layout.words * NR, blocks * layout.G, tiles);
        for (int64_t b = 0; b < blocks; ++b) {
          cells(now, next, block + b, first, last, tiles + b * layout.G * kRowPanels * kTile,
                states[1 - parity]);
        }
      }
    }
  }

  void cells(const Step& now, const Step& next, int64_t block, int64_t first, int64_t last,
             const float* tile, float* state) const {
    for (int64_t i = first; i < last; i += chain.height, tile += kTile) {
      for (int64_t r = 0; r < at_most(last - i, chain.height); ++r) {
        row_of_cells(now, next, block, i + r, tile + r * NR);
      }
      publish(block, i, state);
    }
  }

  // The element (n, d, j) of what has G' values for each h.
  int64_t at(const Step& now, int64_t row, int64_t block, int64_t per_unit) const {
    const int64_t n = now.offset + chain.begin + row;
    return (n * p.of.D + chain.direction) * per_unit * p.of.H + block * NR;
  }

  void prefetch_gates(const Step& now, int64_t block, int64_t blocks, int64_t first,
                      int64_t last) const {
    for (int64_t row = first; row < last; ++row) {
      const T* gates = in(p.gates) + at(now, row, block, layout.G);
      for (int64_t g = 0; g < layout.G; ++g) {
        for (int64_t line = 0; line < blocks * NR; line += 64 / int64_t(sizeof(T))) {
          __builtin_prefetch(gates + g * p.of.H + line, 0, 2);
        }
      }
    }
  }

  // A block of one sequence's units: `products` a tile's row, the next gate's kRowPanels tiles on.
  void row_of_cells(const Step& now, const Step& next, int64_t block, int64_t row,
                    const float* products) const {
    const int64_t H = p.of.H, here = at(now, row, block, 1);
    T* gates_row = out(p.gates) + at(now, row, block, layout.G);
    const bool ends = chain.begin + row >= next.rows;
    for (int64_t v = 0; v < layout.units(block); v += W) {
      const int64_t n = layout.units(block) - v, state = row * layout.width() + block * NR + v;
      vf gates[G<mode>], product[G<mode>];
      for (int g = 0; g < G<mode>; ++g) {
        gates[g] = load_upto(gates_row + g * H + v, n);
        product[g] = load(products + g * kRowPanels * kTile + v);
      }
      if constexpr (mode == Mode::gru) {
        product[2] += load_or(in(p.bias_n), chain.direction * H + block * NR + v, n, 0.0f);
      }
      const vf before = load(h_state + state);
      vf reserve = mode == Mode::lstm ? load(c_state + state) : zero();
      vf h = cell<mode>(gates, product, before, reserve);
      if (p.zoneout) h = fma(load_upto(in(p.zoneout) + here + v, n), before - h, h);
      store(h_state + state, h);
      if (mode == Mode::lstm) store(c_state + state, reserve);
      store_upto(out(p.y) + here + v, h, n);
      if (p.save) {
        for (int g = 0; g < G<mode>; ++g) store_upto(gates_row + g * H + v, gates[g], n);
        if (reserves<mode>) store_upto(p.reserve + here + v, reserve, n);
      }
      if (ends) {
        const int64_t last = (chain.direction * p.of.B + chain.begin + row) * H + block * NR + v;
        store_upto(out(p.hn) + last, h, n);
        if (mode == Mode::lstm) store_upto(out(p.cn) + last, reserve, n);
      }
    }
  }
};

template <Mode mode, class T>
void scan_by(const Scan& p, const Member& member, const ScanSpace<T>& space) {
  const Layout<T>& layout = space.layout;
  const Sizes& of = p.of;
  pack_weights<T>(of, p.w_hh, false, space.panels, member);
  member.wait_for_all();
  for_chains(of, layout.blocks, member, [&](const Chain& chain) BIGKERN_FN {
    float* state = space.states + chain.first_panel * layout.words * MR;
    const int64_t row = (chain.direction * of.B + chain.begin) * layout.width();
    const Forward<mode, T> forward = {p,
                                      chain,
                                      layout,
                                      space.panels + chain.direction * layout.panels(),
                                      {state, state + space.row_panels * layout.words * MR},
                                      space.h + row,
                                      space.c + row,
                                      space.tiles + member.me * space.tiles_each()};
    forward.begin();
    member.wait_for_chain();
    int parity = 0;
    for (Step now = first_step(of, chain.direction); now.rows > 0; parity = 1 - parity) {
      const Step next = next_step(of, chain.direction, now);
      forward.step(now, next, parity);
      member.wait_for_chain();
      now = next;
    }
  });
}

}  // namespace
}  // namespace bigkern::recurrent::BIGKERN_ISA
