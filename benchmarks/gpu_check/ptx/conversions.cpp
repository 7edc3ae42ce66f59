// cvt, and mov between a register and its parts; half-width numbers.
#include <cmath>
#include <limits>

#include "elementwise.h"
#include "halves.h"

namespace ptx {
namespace {

// Rounded to odd, so that rounding once more to a narrower type rounds as if once.
float to_odd(double x) {
  const float near = static_cast<float>(x);
  if (std::isnan(x) || std::isinf(near) || static_cast<double>(near) == x) return near;
  const float low = std::fabs(static_cast<double>(near)) < std::fabs(x) ? near : std::nextafterf(near, 0.0f);
  uint32_t bits;
  std::memcpy(&bits, &low, 4);
  bits |= 1;
  float odd;
  std::memcpy(&odd, &bits, 4);
  return odd;
}

// Integers of any width between registers at least as wide: extended by the kind of the result.
template <class D, class S>
void integer(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      const D value = static_cast<D>(static_cast<S>(any_register(w, i.o[1], lane)));
      set_any_register(w, i.o[0], lane, static_cast<uint64_t>(static_cast<int64_t>(value)));
    }
}

template <class D>
void integers_to(Table& t, const std::string& to) {
  const std::string name = "cvt." + to + ".";
  t[name + "u8"] = {&integer<D, uint8_t>, "vv"};
  t[name + "s8"] = {&integer<D, int8_t>, "vv"};
  t[name + "u16"] = {&integer<D, uint16_t>, "vv"};
  t[name + "s16"] = {&integer<D, int16_t>, "vv"};
  t[name + "u32"] = {&integer<D, uint32_t>, "vv"};
  t[name + "s32"] = {&integer<D, int32_t>, "vv"};
  t[name + "u64"] = {&integer<D, uint64_t>, "vv"};
  t[name + "s64"] = {&integer<D, int64_t>, "vv"};
}

template <class S>
void floats_from(Table& t, const std::string& from) {
  t["cvt.rn.f32." + from] = elementwise<float, S>([](S a) { return static_cast<float>(a); });
  t["cvt.rn.bf16." + from] = elementwise<uint16_t, S>([](S a) { return to_bfloat16(to_odd(static_cast<double>(a))); });
  t["cvt.rn.f16." + from] = elementwise<uint16_t, S>([](S a) { return to_half(to_odd(static_cast<double>(a))); });
}

// Out of range: the nearest there is; NaN: 0.
template <class D>
D saturated(double x) {
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (x >= static_cast<double>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(x);
}

template <class D>
void floats_to(Table& t, const std::string& to) {
  t["cvt.rzi." + to + ".f32"] =
      elementwise<D, float>([](float a) { return saturated<D>(std::trunc(static_cast<double>(a))); });
  t["cvt.rni." + to + ".f32"] =
      elementwise<D, float>([](float a) { return saturated<D>(std::nearbyint(static_cast<double>(a))); });
  t["cvt.rmi." + to + ".f32"] =
      elementwise<D, float>([](float a) { return saturated<D>(std::floor(static_cast<double>(a))); });
}

float rounded_to_tf32(float x) {  // ties away from zero
  if (!std::isfinite(x)) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x1000u) & ~0x1FFFu;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <uint16_t (*convert)(float)>
uint32_t pair_of(float high, float low) {
  return static_cast<uint32_t>(convert(high)) << 16 | convert(low);
}

template <class W, class P>
void pack(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      uint64_t value = 0;
      for (int k = 1; k < i.count; ++k)
        value |= static_cast<uint64_t>(w.reg<P>(i.o[k])[lane]) << (8 * sizeof(P) * (k - 1));
      w.reg<W>(i.o[0])[lane] = static_cast<W>(value);
    }
}

template <class W, class P>
void unpack(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      const uint64_t value = w.reg<W>(i.o[i.count - 1])[lane];
      for (int k = 0; k < i.count - 1; ++k)
        w.reg<P>(i.o[k])[lane] = static_cast<P>(value >> (8 * sizeof(P) * k));
    }
}

template <float (*widen)(uint16_t), uint16_t (*narrow)(float)>
uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift : {0, 16}) {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float u = widen(x), v = widen(y);
    const bool first = std::isnan(v) || u > v || (u == v && !std::signbit(u));
    const uint16_t chosen = std::isnan(u) && std::isnan(v) ? 0x7FFF : std::isnan(u) ? y : first ? x : y;
    result |= static_cast<uint32_t>(chosen) << shift;
  }
  return result;
}

}  // namespace

void add_conversions(Table& t) {
  integers_to<uint8_t>(t, "u8");
  integers_to<int8_t>(t, "s8");
  integers_to<uint16_t>(t, "u16");
  integers_to<int16_t>(t, "s16");
  integers_to<uint32_t>(t, "u32");
  integers_to<int32_t>(t, "s32");
  integers_to<uint64_t>(t, "u64");
  integers_to<int64_t>(t, "s64");
  floats_from<uint16_t>(t, "u16");
  floats_from<int16_t>(t, "s16");
  floats_from<uint32_t>(t, "u32");
  floats_from<int32_t>(t, "s32");
  floats_from<int64_t>(t, "s64");
  floats_from<uint64_t>(t, "u64");
  floats_to<uint32_t>(t, "u32");
  floats_to<int32_t>(t, "s32");
  t["cvt.f32.bf16"] = elementwise<float, uint16_t>(Of<from_bfloat16>{});
  t["cvt.f32.f16"] = elementwise<float, uint16_t>(Of<from_half>{});
  t["cvt.rn.bf16.f32"] = elementwise<uint16_t, float>(Of<to_bfloat16>{});
  t["cvt.rn.f16.f32"] = elementwise<uint16_t, float>(Of<to_half>{});
  t["cvt.rn.bf16x2.f32"] = elementwise<uint32_t, float, float>(Of<pair_of<to_bfloat16>>{});
  t["cvt.rn.f16x2.f32"] = elementwise<uint32_t, float, float>(Of<pair_of<to_half>>{});
  t["cvt.rna.tf32.f32"] = elementwise<float, float>(Of<rounded_to_tf32>{});
  t["cvt.rni.f32.f32"] = elementwise<float, float>([](float a) { return std::nearbyint(a); });
  t["cvt.rmi.f32.f32"] = elementwise<float, float>([](float a) { return std::floor(a); });
  t["max.bf16x2"] = elementwise<uint32_t, uint32_t, uint32_t>(Of<larger_pair<from_bfloat16, to_bfloat16>>{});
  t["max.f16x2"] = elementwise<uint32_t, uint32_t, uint32_t>(Of<larger_pair<from_half, to_half>>{});
  t["mov.b32.pack2"] = {&pack<uint32_t, uint16_t>, "whh"};
  t["mov.b64.pack2"] = {&pack<uint64_t, uint32_t>, "xww"};
  t["mov.b64.pack4"] = {&pack<uint64_t, uint16_t>, "xhhhh"};
  t["mov.b32.unpack2"] = {&unpack<uint32_t, uint16_t>, "hhw"};
  t["mov.b64.unpack2"] = {&unpack<uint64_t, uint32_t>, "wwx"};
  t["mov.b64.unpack4"] = {&unpack<uint64_t, uint16_t>, "hhhhx"};
}

}  // namespace ptx
