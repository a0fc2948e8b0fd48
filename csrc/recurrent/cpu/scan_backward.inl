// The scan backward: the walk of the layer (layer.inl), the other way.
//
//   dh of step t  =  dgates of the step after it  x  W_hh  +  dy  +  what passes by the weights
//
// A step makes a block's dh from the dgates that all threads of the chain left after the step
// before, then the block's dgates of all gates from it: one product, the cell, one barrier. W_hh
// is packed so that a block's product runs over the words of all gates, one gate after the other.
//
// Sequences end where the walk begins: at their last step dh is dhn + dy. They begin where it ends:
// one more product gives dh0, with the next step's or, at the very end, by itself.
//
// Compiled once per instruction set.

#ifndef BIGKERN_ISA  // an editor reads this file by itself
#include "recurrent/cpu/layer.inl"
#endif

namespace bigkern::recurrent::BIGKERN_ISA {
namespace {

template <class T>
struct BackwardSpace {
  Layout<T> layout;
  int64_t row_panels;  // of all chains of both directions, whatever the sharing

  BackwardSpace(const ScanBackward& p, int threads, void* workspace)
      : layout(p.of), row_panels(most_row_panels(p.of, threads)) {
    Workspace parts(workspace);
    weights = parts.take(p.of.D * layout.panels(layout.words));
    operands = parts.take(2 * row_panels * panel_each());
    dh = parts.take(p.of.D * p.of.B * layout.width());
    dc = parts.take(p.of.D * p.of.B * layout.width());
    tiles = parts.take(threads * tiles_each());
    bytes = parts.bytes();
  }
  int64_t panel_each() const { return layout.G * layout.words * MR; }
  int64_t tiles_each() const { return (kPanels * kRowPanels + layout.G) * kTile; }

  float* weights;   // [D][blocks][G][words][NR], transposed
  float* operands;  // [2] x row panels x [G][words][height]: dgates of a step, as words of T
  float *dh, *dc;   // [D, B, width]: what passes by the weights
  float* tiles;     // a thread: of dh [kPanels][kRowPanels][MR][NR], of dgates [G][MR][NR]
  size_t bytes;
};

constexpr int64_t kRowsAhead = 4;

template <Mode mode, class T>
struct Backward : Places<T> {
  using Places<T>::of, Places<T>::chain, Places<T>::in, Places<T>::out, Places<T>::at,
      Places<T>::of_state;
  const ScanBackward& p;
  const Layout<T>& layout;
  const float* weights;
  float* operands[2];
  float *dh_state, *dc_state;
  float *dh_tiles, *dgates_tiles;

  // The gradients of `now`, whose rows are gone on with in `done`, and came from `before`. Either
  // may have no rows: at the first step and after the last.
  void step(const Step& done, const Step& now, const Step& before, int parity) const {
    const int64_t done_rows = chain.present(done.rows), now_rows = chain.present(now.rows);
    const int64_t rows = done_rows > now_rows ? done_rows : now_rows;
    const int64_t K = layout.G * layout.words;
    to_and_fro(chain, kPanels, parity, [&](int64_t block, int64_t blocks) BIGKERN_FN {
      for (int64_t first = 0; first < rows; first += kRowPanels * chain.height) {
        const int64_t last = at_most(rows, first + kRowPanels * chain.height);
        if (first < done_rows) {
          multiply_panels<T>(at_most(last, done_rows) - first, chain.height, K,
                             operands[parity] + first * K, weights + block * K * NR, blocks,
                             dh_tiles, kRowPanels);
        }
        for (int64_t b = 0; b < blocks; ++b) {
          cells(done_rows, now_rows, now, before, block + b, first, last,
                dh_tiles + b * kRowPanels * kTile, operands[1 - parity]);
        }
      }
    });
  }

  void cells(int64_t done_rows, int64_t now_rows, const Step& now, const Step& before,
             int64_t block, int64_t first, int64_t last, const float* tile, float* operand) const {
    for (int64_t i = first; i < last; i += chain.height, tile += kTile) {
      for (int64_t r = 0; r < at_most(last - i, chain.height); ++r) {
        const float* product = i + r < done_rows ? tile + r * NR : nullptr;
        prefetch(now, before, block, at_most(i + r + kRowsAhead, last - 1));
        if (i + r < now_rows) {
          row_of_cells(now, before, block, i + r, product, dgates_tiles + r * NR);
        } else {
          leave(block, i + r, product);
        }
      }
      if (i < now_rows) publish(block, i, now_rows, operand);
    }
  }

  // The dgates of a row panel into the panels of the next product.
  void publish(int64_t block, int64_t i, int64_t rows, float* operand) const {
    for (int64_t g = 0; g < layout.G; ++g) {
      const int64_t word = g * layout.words + words_of<T>(block * NR);
      pack_state<T>(dgates_tiles + g * kTile, NR, rows - i, chain.height, layout.units(block),
                    operand + i * layout.G * layout.words + word * chain.height);
    }
  }

  // Asks for what row_of_cells() will read and write: rows are too far apart for the hardware to.
  void prefetch(const Step& now, const Step& before, int64_t block, int64_t row) const {
    const int64_t here = at(now, row, block, 1), gates = at(now, row, block, layout.G);
    for (int64_t j = 0; j < NR; j += 64 / int64_t(sizeof(T))) {
      for (int64_t g = 0; g < layout.G; ++g) {
        __builtin_prefetch(in(p.gates) + gates + g * of.H + j);
        __builtin_prefetch(out(p.dgates) + gates + g * of.H + j, 1);
      }
      if (p.dy) __builtin_prefetch(in(p.dy) + here + j);
      if (mode == Mode::gru) __builtin_prefetch(in(p.y) + at(before, row, block, 1) + j);
    }
    for (int64_t j = 0; reserves<mode> && j < NR; j += 64 / int64_t(sizeof(float))) {
      __builtin_prefetch(p.reserve + here + j);
      if (mode == Mode::lstm) __builtin_prefetch(p.reserve + at(before, row, block, 1) + j);
    }
  }

  // A block of one sequence's units. `product` is its part of dh that comes through the weights,
  // null at its last step; the gradients that go through them are left at `operand`.
  void row_of_cells(const Step& now, const Step& before, int64_t block, int64_t row,
                    const float* product, float* operand) const {
    const int64_t H = of.H, here = at(now, row, block, 1), gates = at(now, row, block, layout.G);
    const bool begins = chain.begin + row >= before.rows;
    const int64_t earlier = begins ? of_state(block, row) : at(before, row, block, 1);
    for (int64_t v = 0; v < layout.units(block); v += W) {
      const int64_t n = layout.units(block) - v, state = row * layout.width() + block * NR + v;
      vf dh = zero(), dc = zero();
      if (product) {
        dh = load(product + v) + load(dh_state + state);
        if (mode == Mode::lstm) dc = load(dc_state + state);
      } else {
        dh = load_or(in(p.dhn), of_state(block, row) + v, n, 0.0f);
        if (mode == Mode::lstm) dc = load_or(in(p.dcn), of_state(block, row) + v, n, 0.0f);
      }
      dh += load_or(in(p.dy), here + v, n, 0.0f);

      vf gate[G<mode>], past_zoneout = zero(), hidden_n = zero(), of_before = zero();
      for (int g = 0; g < G<mode>; ++g) gate[g] = load_upto(in(p.gates) + gates + g * H + v, n);
      const vf reserve = reserves<mode> ? load_upto(p.reserve + here + v, n) : zero();
      if (mode == Mode::lstm && !begins) of_before = load_upto(p.reserve + earlier + v, n);
      if (mode == Mode::lstm && begins) of_before = load_upto(in(p.c0) + earlier + v, n);
      if (mode == Mode::gru) of_before = load_upto(in(begins ? p.h0 : p.y) + earlier + v, n);
      if (p.zoneout) {
        past_zoneout = dh * load_upto(in(p.zoneout) + here + v, n);
        dh -= past_zoneout;
      }
      cell_backward<mode>(gate, reserve, of_before, dh, dc, hidden_n);
      store(dh_state + state, dh + past_zoneout);
      if (mode == Mode::lstm) store(dc_state + state, dc);
      for (int g = 0; g < G<mode>; ++g) {
        store_upto(out(p.dgates) + gates + g * H + v, gate[g], n);
        store(operand + g * kTile + v, mode == Mode::gru && g == 2 ? hidden_n : gate[g]);
      }
      if (mode == Mode::gru) store_upto(out(p.dhidden_n) + here + v, hidden_n, n);
    }
  }

  // A sequence whose first step is done.
  void leave(int64_t block, int64_t row, const float* product) const {
    for (int64_t v = 0; v < layout.units(block); v += W) {
      const int64_t n = layout.units(block) - v, state = row * layout.width() + block * NR + v;
      store_upto(out(p.dh0) + of_state(block, row) + v, load(product + v) + load(dh_state + state),
                 n);
      if (mode == Mode::lstm) {
        store_upto(out(p.dc0) + of_state(block, row) + v, load(dc_state + state), n);
      }
    }
  }
};

template <Mode mode, class T>
void scan_backward_by(const ScanBackward& p, const Member& member, const BackwardSpace<T>& space) {
  const Layout<T>& layout = space.layout;
  const Sizes& of = p.of;
  pack_weights<T>(layout, of.D, p.w_hh, layout.H, true, space.weights, member);
  member.wait_for_all();
  for_chains(of, layout.blocks, member, [&](const Chain& chain) BIGKERN_FN {
    float* operand = space.operands + chain.first_panel * space.panel_each();
    float* tiles = space.tiles + member.me * space.tiles_each();
    const int64_t row = (chain.direction * of.B + chain.begin) * layout.width();
    const Backward<mode, T> backward = {
        {of, chain},
        p,
        layout,
        space.weights + chain.direction * layout.panels(layout.words),
        {operand, operand + space.row_panels * space.panel_each()},
        space.dh + row,
        space.dc + row,
        tiles,
        tiles + kPanels * kRowPanels * kTile};
    const int64_t way = 1 - chain.direction;
    Step done{-1, 0, 0}, now = first_step(of, way);
    for (int parity = 0; now.rows > 0 || done.rows > 0; parity = 1 - parity) {
      const Step before = next_step(of, way, now);
      backward.step(done, now, before, parity);
      member.wait_for_chain();
      done = now;
      now = before;
    }
  });
}

}  // namespace
}  // namespace bigkern::recurrent::BIGKERN_ISA
