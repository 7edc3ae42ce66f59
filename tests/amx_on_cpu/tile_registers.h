// AMX without AMX: eight tile registers of each thread and the instructions on them in plain C++, as Intel's manual
// defines them (Software Developer's Manual volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE,
// TDPBF16PS). Included before everything else (-include), it takes the place of the compiler's intrinsics. Whatever a
// processor would refuse ends the process with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>

namespace tile_registers {

#define TILE_FUNCTION inline __attribute__((noinline)) void  // inlined everywhere, they would be long to compile

constexpr int kTiles = 8, kMostRows = 16, kRowBytes = 64;

struct Tile {
  alignas(64) uint8_t row[kMostRows][kRowBytes];
  int rows, row_bytes;
};

struct State {
  bool configured;
  Tile tiles[kTiles];
};

inline State& state() {
  static thread_local State of_this_thread = {};
  return of_this_thread;
}

[[noreturn]] inline void refuse(const char* what, int tile) {
  std::fprintf(stderr, "tile_registers: %s (tile %d)\n", what, tile);
  std::abort();
}

// A tile that may be used now.
inline Tile& tile(int number) {
  if (!state().configured) refuse("used without a configuration", number);
  if (number < 0 || number >= kTiles) refuse("there is no such tile", number);
  Tile& t = state().tiles[number];
  if (t.rows == 0) refuse("not configured", number);
  return t;
}

TILE_FUNCTION zero(int number) { std::memset(tile(number).row, 0, sizeof(Tile::row)); }

TILE_FUNCTION load_configuration(const void* address) {
  uint8_t bytes[64];
  std::memcpy(bytes, address, sizeof bytes);
  if (bytes[0] != 1) refuse("only palette 1 is known", -1);
  for (int i = 1; i < 16; ++i)
    if (bytes[i] != 0) refuse("start row and reserved bytes must be 0", -1);
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    if (i >= kTiles && (rows != 0 || row_bytes != 0)) refuse("palette 1 has eight tiles", i);
    if (rows > kMostRows || row_bytes > kRowBytes) refuse("configured larger than 16 rows of 64 bytes", i);
    if ((rows == 0) != (row_bytes == 0)) refuse("configured with rows or bytes only", i);
    if (i < kTiles) state().tiles[i] = {{}, rows, row_bytes};
  }
  state().configured = true;
}

inline void release() { state().configured = false; }

TILE_FUNCTION load(int number, const void* base, int64_t stride) {
  Tile& t = tile(number);
  zero(number);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.row[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(t.row_bytes));
}

TILE_FUNCTION store(int number, void* base, int64_t stride) {
  const Tile& t = tile(number);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t.row[r], static_cast<size_t>(t.row_bytes));
}

// Denormals are zeros, going in and coming out.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float from_bfloat16(const uint8_t* at) {
  uint16_t high;
  std::memcpy(&high, at, sizeof high);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

TILE_FUNCTION multiply_bfloat16(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  if (sums == left || sums == right || left == right) refuse("the three tiles of a product must differ", sums);
  if (a.rows != c.rows || b.row_bytes != c.row_bytes || b.rows != a.row_bytes / 4)
    refuse("the shapes of a product do not fit", sums);
  const int columns = c.row_bytes / 4, pairs = a.row_bytes / 4;
  float factor[2][kMostRows][kMostRows] = {};
  for (int k = 0; k < pairs; ++k)
    for (int n = 0; n < columns; ++n)
      for (int half = 0; half < 2; ++half)
        factor[half][k][n] = from_bfloat16(b.row[k] + 4 * n + 2 * half);
  for (int m = 0; m < c.rows; ++m) {
    float part[2][kMostRows] = {}, sum[kMostRows];
    for (int k = 0; k < pairs; ++k)
      for (int half = 0; half < 2; ++half) {
        const float x = from_bfloat16(a.row[m] + 4 * k + 2 * half);
        for (int n = 0; n < kMostRows; ++n)
          part[half][n] = flushed(std::fma(x, factor[half][k][n], part[half][n]));
      }
    std::memcpy(sum, c.row[m], sizeof sum);
    for (int n = 0; n < kMostRows; ++n)
      sum[n] = flushed(flushed(sum[n]) + flushed(part[0][n] + part[1][n]));
    std::memset(c.row[m], 0, kRowBytes);
    std::memcpy(c.row[m], sum, static_cast<size_t>(c.row_bytes));
  }
}

#undef TILE_FUNCTION

}  // namespace tile_registers

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(address) tile_registers::load_configuration(address)
#define _tile_release() tile_registers::release()
#define _tile_zero(tile) tile_registers::zero(tile)
#define _tile_loadd(tile, base, stride) tile_registers::load(tile, base, stride)
#define _tile_stored(tile, base, stride) tile_registers::store(tile, base, stride)
#define _tile_dpbf16ps(sums, left, right) tile_registers::multiply_bfloat16(sums, left, right)
