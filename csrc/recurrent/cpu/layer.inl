// A layer forward: the input's product for some steps at a time, then step by step the state's, and
// the cell on the tiles of both.
//
//   h' as panels      weights of a block of units       tiles
//   [K][height]       [K][NR] a gate, from L2 or L3     gates: [height][NR] each
//   +-----------+     +---+ +---+ +---+ +---+           +---+ +---+ +---+ +---+
//   | sequences |  x  | i | | f | | g | | o |     =     | i | | f | | g | | o |  -> cell -> h, c
//   +-----------+     +---+ +---+ +---+ +---+           +---+ +---+ +---+ +---+        |
//         ^                                               + those of x, all steps      |
//         |                                                 of a chunk in one product  |
//         +------------------- transposed, into the other buffer ----------------------+
//
// h' has two buffers, so that a chain's threads wait for each other once a step. The fp32 state h,
// c and the input's tiles are their thread's alone. Compiled once per instruction set.

#include <cstring>

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "recurrent/cpu/cell.inl"
#endif

namespace bigkern::recurrent::BIGKERN_ISA {
namespace {

template <class T>
struct LayerSpace {
  Layout<T> layout;
  int64_t input_words;
  int64_t row_panels;    // of the state, all chains of both directions, whatever the sharing
  int64_t chunk_panels;  // of the rows of a chunk: at least one step's
  int threads;

  LayerSpace(const Layer& p, int threads, void* workspace)
      : layout(p.of),
        input_words(p.x ? words_of<T>(p.I) : 0),
        row_panels(most_row_panels(p.of, threads)),
        chunk_panels(p.x ? at_least(kRowPanels, (p.of.B + MR - 1) / MR) : 0),
        threads(threads) {
    const int64_t D = p.of.D, chains = D * at_most(threads, p.of.B);
    Workspace parts(workspace);
    input_weights = parts.take(D * layout.panels(input_words));
    weights = parts.take(D * layout.panels(layout.words));
    bias = parts.take(D * (layout.G + 1) * layout.width());
    inputs = parts.take(chains * inputs_each());
    input_tiles = parts.take(chains * input_tiles_each());
    states = parts.take(2 * row_panels * layout.words * MR);
    h = parts.take(D * p.of.B * layout.width());
    c = parts.take(D * p.of.B * layout.width());
    tiles = parts.take(threads * tiles_each());
    sources = reinterpret_cast<int64_t*>(parts.take(2 * threads * chunk_panels * MR));
    bytes = parts.bytes();
  }
  int64_t inputs_each() const { return chunk_panels * input_words * MR; }
  int64_t input_tiles_each() const { return layout.blocks * layout.G * chunk_panels * kTile; }
  int64_t tiles_each() const { return kPanels * kRowPanels * kTile; }

  float* input_weights;  // [D][blocks][G][input words][NR]
  float* weights;        // [D][blocks][G][words][NR]
  float* bias;           // [D][G + 1][width]: of the gates, then GRU's b_hn
  float* inputs;         // a chain: [chunk panels][input words][MR], x as words of T
  float* input_tiles;    // a chain: [blocks][G][chunk panels][MR][NR]
  float* states;         // [2] x row panels x [words][height]: h' and h, as words of T
  float *h, *c;          // [D, B, width]
  float* tiles;          // a thread: [kPanels][kRowPanels][MR][NR]
  int64_t* sources;      // a thread: the rows of x in the chunk
  size_t bytes;
};

template <Mode mode, class T>
struct Forward : Places<T> {
  using Places<T>::of, Places<T>::chain, Places<T>::in, Places<T>::out, Places<T>::at,
      Places<T>::of_state;
  const Layer& p;
  const Member& member;
  const LayerSpace<T>& space;
  const Layout<T>& layout;
  float *inputs, *input_tiles;  // of the chain
  float* states[2];             // of the chain: [row panels][words][height]
  float *h_state, *c_state;     // of the chain's first sequence: [rows, width]
  float* tiles;                 // of the thread
  int64_t* sources;

  // Sequences from h0, c0: into both buffers, for those that join later find it in either.
  void begin() const {
    for (int64_t block = chain.first_block; block < chain.last_block; ++block) {
      for (int64_t row = 0; row < chain.rows; ++row) {
        const int64_t from = of_state(block, row), to = row * layout.width() + block * NR;
        for (int64_t v = 0; v < NR; v += W) {
          const int64_t n = layout.units(block) - v;
          store(h_state + to + v, n > 0 ? load_upto(in(p.h0) + from + v, n) : zero());
          if (mode == Mode::lstm) {
            store(c_state + to + v, n > 0 ? load_upto(in(p.c0) + from + v, n) : zero());
          }
        }
      }
      for (float* state : states) {
        for (int64_t i = 0; i < chain.rows; i += chain.height) publish(block, i, state);
      }
    }
  }

  void walk() const {
    int parity = 0;
    for (Step now = first_step(of, chain.direction); now.rows > 0;) {
      const Step end = p.x ? project(now) : next_step(of, chain.direction, now);
      int64_t input_row = 0;
      while (now.t != end.t) {
        const Step next = next_step(of, chain.direction, now);
        step(now, next, parity, input_row);
        member.wait_for_chain();
        input_row += chain.present(now.rows);
        parity = 1 - parity;
        now = next;
      }
    }
  }

  // The input's tiles of as many steps from `now` on as fit; returns the step after them.
  Step project(const Step& now) const {
    const int64_t words = space.input_words, columns = member.sharing.columns;
    int64_t rows = 0;
    Step end = now;
    do {
      for (int64_t row = 0; row < chain.present(end.rows); ++row) {
        sources[rows++] = end.offset + chain.begin + row;
      }
      end = next_step(of, chain.direction, end);
    } while (end.rows > 0 && rows + chain.present(end.rows) <= space.chunk_panels * MR);

    for (int64_t i = member.column() * MR; i < rows; i += columns * MR) pack_input(i, rows);
    member.wait_for_chain();
    const float* weights = space.input_weights + chain.direction * layout.panels(words);
    for_blocks(0, [&](int64_t block, int64_t blocks) BIGKERN_FN {
      for (int64_t i = 0; i < rows; i += kRowPanels * MR) {
        multiply_panels<T>(at_most(rows - i, kRowPanels * MR), MR, words, inputs + i * words,
                           weights + block * layout.G * words * NR, blocks * layout.G,
                           input_tiles_of(block) + i / MR * kTile, space.chunk_panels);
      }
    });
    return end;
  }

  void pack_input(int64_t i, int64_t rows) const {
    const auto row = [&](int64_t r, int64_t k, int64_t n)
                         BIGKERN_FN { return words_along(in(p.x) + sources[i + r] * p.I + k, n); };
    for (int64_t k = 0; k < p.I; k += kSlab) {
      pack_rows<MR, T>(at_most(rows - i, MR), k, at_most(p.I, k + kSlab),
                       inputs + i * space.input_words + words_of<T>(k) * MR, row);
    }
  }

  // One step. `input_row` is its first row in the chunk.
  void step(const Step& now, const Step& next, int parity, int64_t input_row) const {
    const int64_t rows = chain.present(now.rows), words = layout.words;
    const float* weights = space.weights + chain.direction * layout.panels(words);
    for_blocks(parity, [&](int64_t block, int64_t blocks) BIGKERN_FN {
      for (int64_t first = 0; first < rows; first += kRowPanels * chain.height) {
        const int64_t last = at_most(rows, first + kRowPanels * chain.height);
        multiply_panels<T>(last - first, chain.height, words, states[parity] + first * words,
                           weights + block * layout.G * words * NR, blocks * layout.G, tiles,
                           kRowPanels);
        for (int64_t b = 0; b < blocks; ++b) {
          cells(now, next, block + b, first, last, input_row,
                tiles + b * layout.G * kRowPanels * kTile, states[1 - parity]);
        }
      }
    });
  }

  void cells(const Step& now, const Step& next, int64_t block, int64_t first, int64_t last,
             int64_t input_row, const float* tile, float* state) const {
    for (int64_t i = first; i < last; i += chain.height, tile += kTile) {
      for (int64_t r = 0; r < at_most(last - i, chain.height); ++r) {
        const int64_t input = input_row + i + r;
        row_of_cells(now, next, block, i + r, tile + r * NR,
                     input_tiles_of(block) + input / MR * kTile + input % MR * NR);
      }
      publish(block, i, state);
    }
  }

  // Calls f(block, blocks) for the thread's blocks, as many at a time as a product takes.
  template <class F>
  void for_blocks(int parity, const F& f) const {
    to_and_fro(chain, kPanels / layout.G, parity, f);
  }

  // The h of a row panel, from the fp32 state into the panels of the next product: of those that
  // have not joined yet, too.
  void publish(int64_t block, int64_t i, float* state) const {
    const float* h = h_state + i * layout.width() + block * NR;
    pack_state<T>(h, layout.width(), chain.rows - i, chain.height, layout.units(block),
                  state + i * layout.words + words_of<T>(block * NR) * chain.height);
  }

  float* input_tiles_of(int64_t block) const {
    return input_tiles + block * layout.G * space.chunk_panels * kTile;
  }

  // A block of one sequence's units: `products` and `inputs` are rows of tiles, the next gates'
  // further on; of projected gates there are no inputs.
  void row_of_cells(const Step& now, const Step& next, int64_t block, int64_t row,
                    const float* products, const float* inputs) const {
    const int64_t H = of.H, here = at(now, row, block, 1);
    const float* bias = space.bias + chain.direction * (layout.G + 1) * layout.width() + block * NR;
    const int64_t here_gates = at(now, row, block, layout.G);
    const T* projected = p.x ? nullptr : in(p.projected) + here_gates;
    T* gates_row = p.gates ? out(p.gates) + here_gates : nullptr;
    const bool ends = chain.begin + row >= next.rows;
    for (int64_t v = 0; v < layout.units(block); v += W) {
      const int64_t n = layout.units(block) - v, state = row * layout.width() + block * NR + v;
      vf gates[G<mode>], product[G<mode>];
      for (int g = 0; g < G<mode>; ++g) {
        gates[g] = projected ? load_upto(projected + g * H + v, n)
                             : load(inputs + g * space.chunk_panels * kTile + v) +
                                   load(bias + g * layout.width() + v);
        product[g] = load(products + g * kRowPanels * kTile + v);
      }
      if (mode == Mode::gru) product[G<mode> - 1] += load(bias + G<mode> * layout.width() + v);
      const vf before = load(h_state + state);
      vf reserve = mode == Mode::lstm ? load(c_state + state) : zero();
      vf h = cell<mode>(gates, product, before, reserve);
      if (p.zoneout) h = fma(load_upto(in(p.zoneout) + here + v, n), before - h, h);
      store(h_state + state, h);
      if (mode == Mode::lstm) store(c_state + state, reserve);
      store_upto(out(p.y) + here + v, h, n);
      if (gates_row) {
        for (int g = 0; g < G<mode>; ++g) store_upto(gates_row + g * H + v, gates[g], n);
        if (reserves<mode>) store_upto(p.reserve + here + v, reserve, n);
      }
      if (ends) {
        store_upto(out(p.hn) + of_state(block, row) + v, h, n);
        if (mode == Mode::lstm) store_upto(out(p.cn) + of_state(block, row) + v, reserve, n);
      }
    }
  }
};

// The biases of a direction's gates as floats: b_ih + b_hh, but for GRU's n, whose b_hh follows.
template <class T>
void widen_biases(const Layer& p, const Layout<T>& layout, int64_t d, float* bias) {
  const T *b_ih = static_cast<const T*>(p.b_ih[d]), *b_hh = static_cast<const T*>(p.b_hh[d]);
  memset(bias, 0, size_t((layout.G + 1) * layout.width()) * sizeof(float));
  const T* bias_n = static_cast<const T*>(p.bias_n);
  for (int64_t i = 0; bias_n && i < layout.H; ++i) {
    bias[layout.G * layout.width() + i] = to_float(bias_n[d * layout.H + i]);
  }
  for (int64_t i = 0; b_ih && i < layout.G * layout.H; ++i) {
    const int64_t g = i / layout.H, at = g * layout.width() + i % layout.H;
    const bool hidden_n = p.of.mode == Mode::gru && g == 2;
    bias[at] += to_float(b_ih[i]);
    bias[at + (hidden_n ? layout.width() : 0)] += to_float(b_hh[i]);
  }
}

template <Mode mode, class T>
void layer_by(const Layer& p, const Member& member, const LayerSpace<T>& space) {
  const Layout<T>& layout = space.layout;
  const Sizes& of = p.of;
  if (p.x) pack_weights<T>(layout, of.D, p.w_ih, p.I, false, space.input_weights, member);
  pack_weights<T>(layout, of.D, p.w_hh, of.H, false, space.weights, member);
  for (int64_t d = member.me; d < of.D; d += member.team) {
    widen_biases<T>(p, layout, d, space.bias + d * (layout.G + 1) * layout.width());
  }
  member.wait_for_all();
  for_chains(of, layout.blocks, member, [&](const Chain& chain) BIGKERN_FN {
    float* state = space.states + chain.first_panel * layout.words * MR;
    const int64_t row = (chain.direction * of.B + chain.begin) * layout.width();
    const Forward<mode, T> forward = {{of, chain},
                                      p,
                                      member,
                                      space,
                                      layout,
                                      space.inputs + chain.index * space.inputs_each(),
                                      space.input_tiles + chain.index * space.input_tiles_each(),
                                      {state, state + space.row_panels * layout.words * MR},
                                      space.h + row,
                                      space.c + row,
                                      space.tiles + member.me * space.tiles_each(),
                                      space.sources + member.me * space.chunk_panels * MR};
    forward.begin();
    member.wait_for_chain();
    forward.walk();
  });
}

}  // namespace
}  // namespace bigkern::recurrent::BIGKERN_ISA
