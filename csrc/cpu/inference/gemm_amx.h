// The bfloat16 matrix product of AMX: eight tile registers of 16 rows of 64 bytes, and an instruction that multiplies
// 16 rows of 32 k with 32 k of 16 columns and adds to 16x16 float32 sums. Included by isa_amx_bf16.cpp only, after
// vector.h.
//
// Every sum is made by tdpbf16ps, for a single row too: it adds the even and the odd k of a tile apart and their total
// to the sum, where vdpbf16ps adds each pair to the sum at once, so the two differ in the last bits, and those of a row
// would depend on how many rows come with it. Per element: k ascending in steps of 32, segment after segment.
//
// Tiles are loaded from where the rows are if these are 16, equally spaced and have the whole 32 k; all others are
// first copied to a buffer and filled up with zeros.
#pragma once

#include "kernels.h"

namespace {

using ddpm_fast::inference::Gemm;
using ddpm_fast::inference::kPanel;

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileK = 32;
constexpr int64_t kTileBytes = 64;                  // of a row, in A, B and C alike
constexpr int64_t kCopiedK = 256;                   // copied at a time: enough to hide the copying behind products
constexpr int64_t kCopyStride = 2 * kCopiedK + 64;  // an odd number of cache lines spreads rows over the cache

struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

alignas(64) constexpr TileConfiguration kConfiguration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16},
};

void begin_tiles() { _tile_loadconfig(&kConfiguration); }

void end_tiles() { _tile_release(); }

// Where the tiles of one step begin. Rows of all tiles of B are b_stride bytes apart, tiles of B 64 bytes.
template <int MT>
struct Step {
  static constexpr int kStrides = MT > 2 ? 1 : MT;  // four tiles share one: more would not fit into registers
  const char* a[MT];
  int64_t a_stride[kStrides];
  const char* b;
  int64_t b_stride;
};

#define DDPM_FAST_LOAD_A(tile, i) _tile_loadd(tile, s.a[i], s.a_stride[(i) % s.kStrides])
#define DDPM_FAST_LOAD_B(tile, j) _tile_loadd(tile, s.b + (j) * kTileBytes, s.b_stride)

// MT tiles of rows times NP panels: sums in tiles 0 to 3, panel j of row tile i in i * NP + j, and A and B in the
// others. Tile numbers must be literals, so each shape is written out.
template <int MT, int NP>
inline __attribute__((always_inline)) void multiply(const Step<MT>& s) {
  if constexpr (MT == 2 && NP == 2) {
    DDPM_FAST_LOAD_B(6, 0);
    DDPM_FAST_LOAD_A(4, 0);
    _tile_dpbf16ps(0, 4, 6);
    DDPM_FAST_LOAD_B(7, 1);
    _tile_dpbf16ps(1, 4, 7);
    DDPM_FAST_LOAD_A(5, 1);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else if constexpr (MT == 1) {
    DDPM_FAST_LOAD_A(4, 0);
    DDPM_FAST_LOAD_B(5, 0);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (NP > 1) {
      DDPM_FAST_LOAD_B(6, 1);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (NP > 2) {
      DDPM_FAST_LOAD_B(7, 2);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (NP > 3) {
      DDPM_FAST_LOAD_B(5, 3);
      _tile_dpbf16ps(3, 4, 5);
    }
  } else {
    static_assert(NP == 1 && (MT == 2 || MT == 4));
    DDPM_FAST_LOAD_B(7, 0);
    DDPM_FAST_LOAD_A(4, 0);
    _tile_dpbf16ps(0, 4, 7);
    DDPM_FAST_LOAD_A(5, 1);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (MT == 4) {
      DDPM_FAST_LOAD_A(6, 2);
      _tile_dpbf16ps(2, 6, 7);
      DDPM_FAST_LOAD_A(4, 3);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
}

#undef DDPM_FAST_LOAD_A
#undef DDPM_FAST_LOAD_B

template <int kCount>
inline __attribute__((always_inline)) void clear_sums() {
  _tile_zero(0);
  if constexpr (kCount > 1) _tile_zero(1);
  if constexpr (kCount > 2) _tile_zero(2);
  if constexpr (kCount > 3) _tile_zero(3);
}

template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* target, int64_t stride) {
  if constexpr (kTile == 0) _tile_stored(0, target, stride);
  if constexpr (kTile == 1) _tile_stored(1, target, stride);
  if constexpr (kTile == 2) _tile_stored(2, target, stride);
  if constexpr (kTile == 3) _tile_stored(3, target, stride);
}

// Tile kTile of a block of NP panels, whose first element is *c and which has `rows` rows of `width` bytes in c.
template <int kTile, int NP>
void store_sums(char* c, int64_t width, int64_t rows) {
  c += kTile / NP * kTileRows * width + kTile % NP * kTileBytes;
  rows -= kTile / NP * kTileRows;
  if (rows >= kTileRows) return store_tile<kTile>(c, width);
  alignas(64) char whole[kTileRows * kTileBytes];
  store_tile<kTile>(whole, kTileBytes);
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(c + i * width, whole + i * kTileBytes, kTileBytes);
}

// The next weights, fetched in equal shares with the products of the present ones.
struct Ahead {
  const char* at;
  int64_t lines;  // left
  int64_t share;  // lines with four products

  explicit Ahead(const Gemm& g) : at(static_cast<const char*>(g.next)), lines(0), share(0) {
    if (at == nullptr) return;
    lines = g.next_bytes / 64;
    const int64_t tiles = (g.m + kTileRows - 1) / kTileRows * ((g.k + kTileK - 1) / kTileK);
    const int64_t products = tiles * g.panels * g.segments;
    share = (4 * lines + products - 1) / products;
  }

  // Bytes to be fetched in each of `steps` steps of `products` products; they count as fetched.
  int64_t take(int64_t steps, int64_t products) {
    int64_t each = (share * products + 3) / 4;
    if (each * steps > lines) each = (lines + steps - 1) / steps;
    lines = lines > each * steps ? lines - each * steps : 0;
    return 64 * each;
  }
};

// Up to 16 rows of one segment. Tiles may be loaded from them directly if `in_place`.
struct TileOfRows {
  const void* const* pointers;  // null: rows lie at first + i * stride
  const char* first;
  int64_t stride;  // bytes
  int64_t count;
  bool in_place;

  const char* row(int64_t i) const {
    return pointers != nullptr ? static_cast<const char*>(pointers[i]) : first + i * stride;
  }
};

TileOfRows tile_of_rows(const Gemm& g, int64_t segment, int64_t row) {
  const int64_t left = g.m - row, count = left < kTileRows ? left : kTileRows;
  if (g.rows == nullptr) {
    const char* first = static_cast<const char*>(g.a) + 2 * row * g.a_stride;
    return {nullptr, first, 2 * g.a_stride, count, count == kTileRows};
  }
  const void* const* p = g.rows + segment * g.m + row;
  TileOfRows t = {p, static_cast<const char*>(p[0]), 0, count, false};
  if (count < kTileRows) return t;
  // 15 distances: 0 to 7, then 7 to 14.
  const __m512i near = _mm512_sub_epi64(_mm512_loadu_si512(p + 1), _mm512_loadu_si512(p));
  const __m512i far = _mm512_sub_epi64(_mm512_loadu_si512(p + 8), _mm512_loadu_si512(p + 7));
  t.stride = static_cast<const char*>(p[1]) - t.first;
  const __m512i stride = _mm512_set1_epi64(t.stride);
  t.in_place = (_mm512_cmpneq_epi64_mask(near, stride) | _mm512_cmpneq_epi64_mask(far, stride)) == 0;
  return t;
}

// GCC does not know that tile loads read memory: without this, stores could change places with them.
inline __attribute__((always_inline)) void keep_order() { __asm__ volatile("" ::: "memory"); }

// k .. k + length of the rows, the rest of the last 32 k zero. Nothing is read beyond.
void copy_rows(const TileOfRows& t, int64_t k, int64_t length, char* target) {
  for (int64_t done = 0; done < length; done += kTileK) {
    const int64_t left = length - done;
    const __mmask32 mask = left >= kTileK ? ~0u : (1u << left) - 1;
    for (int64_t i = 0; i < t.count; ++i) {
      const __m512i values = _mm512_maskz_loadu_epi16(mask, t.row(i) + 2 * (k + done));
      _mm512_store_si512(target + i * kCopyStride + 2 * done, values);
    }
  }
}

// c of MT tiles of rows from `row` on and NP panels from `panel` on.
template <int MT, int NP>
void block(const Gemm& g, int64_t row, int64_t panel, Ahead& ahead) {
  alignas(64) char copies[MT][kTileRows * kCopyStride];
  const int64_t width = g.panels * kTileBytes;  // bytes of a row of c and of a row of pairs of b
  const int64_t copied = g.k < kCopiedK ? (g.k + kTileK - 1) / kTileK * kTileK : kCopiedK;
  for (int i = 0; i < MT; ++i)  // rows that do not exist are zeros, their sums are thrown away
    for (int64_t r = g.m - row - i * kTileRows; r < kTileRows; ++r)
      std::memset(copies[i] + r * kCopyStride, 0, 2 * copied);

  Step<MT> s;
  s.b = static_cast<const char*>(g.b) + panel * kTileBytes;
  s.b_stride = width;
  clear_sums<MT * NP>();
  for (int64_t segment = 0; segment < g.segments; ++segment) {
    TileOfRows tiles[MT];
    bool in_place = true;
#pragma GCC unroll 4
    for (int i = 0; i < MT; ++i) {
      tiles[i] = tile_of_rows(g, segment, row + i * kTileRows);
      in_place = in_place && tiles[i].in_place && tiles[i].stride == tiles[i % s.kStrides].stride;
    }
    for (int64_t k = 0, length; k < g.k; k += length) {
      length = g.k - k;
      if (!in_place)
        length = length < kCopiedK ? length : kCopiedK;
      else if (length > kTileK)
        length = length / kTileK * kTileK;
#pragma GCC unroll 4
      for (int i = 0; i < MT; ++i) {
        const bool load = (s.kStrides == MT ? tiles[i].in_place : in_place) && length % kTileK == 0;
        if (!load) copy_rows(tiles[i], k, length, copies[i]);
        s.a[i] = load ? tiles[i].first + 2 * k : copies[i];
        s.a_stride[i % s.kStrides] = load ? tiles[i].stride : kCopyStride;
      }
      int64_t steps = (length + kTileK - 1) / kTileK;
      const int64_t fetched = ahead.take(steps, MT * NP);
      const char* next = ahead.at;
      ahead.at += steps * fetched;
      keep_order();
      for (; steps > 0; --steps) {
        for (const char* stop = next + fetched; next < stop; next += 64)
          _mm_prefetch(next, _MM_HINT_T1);
        multiply<MT, NP>(s);
#pragma GCC unroll 4
        for (int i = 0; i < MT; ++i)
          s.a[i] += kTileBytes;
        s.b += kTileRows * width;
      }
      keep_order();
    }
  }
  char* c = reinterpret_cast<char*>(g.c) + row * width + panel * kTileBytes;
  store_sums<0, NP>(c, width, g.m - row);
  if constexpr (MT * NP > 1) store_sums<1, NP>(c, width, g.m - row);
  if constexpr (MT * NP > 2) store_sums<2, NP>(c, width, g.m - row);
  if constexpr (MT * NP > 3) store_sums<3, NP>(c, width, g.m - row);
}

// Four sums at a time where there are as many: an instruction takes 16 cycles and its result 52, so fewer would wait.
void gemm_tiles(const Gemm& g) {
  Ahead ahead(g);
  const int64_t odd = g.panels % 2;
  for (int64_t row = 0; row < g.m;) {
    const int64_t tiles = (g.m - row + kTileRows - 1) / kTileRows;
    if (odd != 0 && tiles >= 4) {
      if (g.panels == 3) {
        block<2, 2>(g, row, 0, ahead);
        block<2, 2>(g, row + 2 * kTileRows, 0, ahead);
      }
      block<4, 1>(g, row, g.panels - 1, ahead);
      row += 4 * kTileRows;
    } else if (tiles >= 2) {
      for (int64_t panel = 0; panel + 2 <= g.panels; panel += 2)
        block<2, 2>(g, row, panel, ahead);
      if (odd != 0) block<2, 1>(g, row, g.panels - 1, ahead);
      row += 2 * kTileRows;
    } else {
      switch (g.panels) {
      case 1: block<1, 1>(g, row, 0, ahead); break;
      case 2: block<1, 2>(g, row, 0, ahead); break;
      case 3: block<1, 3>(g, row, 0, ahead); break;
      default: block<1, 4>(g, row, 0, ahead);
      }
      row += kTileRows;
    }
  }
}

}  // namespace
