// Arithmetic, logic and comparisons. float32 is IEEE with the rounding that the name says; what has .approx or .full in
// its name is the correctly rounded value here, a few ulp from what a GPU gives.
#include <cmath>
#include <limits>

#include "elementwise.h"

namespace ptx {
namespace {

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// The operand that is a number, if one is; the larger of the zeros is +0.
float larger(float a, float b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
float smaller(float a, float b) { return -larger(-a, -b); }

template <class T, class W>
T high_half(T a, T b) {
  return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
}

template <class T>
T quotient(T a, T b) {  // by zero: whatever, but no trap
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
}

template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

// Field of `length` bits from `position` on; signed: its top bit, or the source's where the field leaves it, repeats.
template <class T>
T bit_field(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const U u = static_cast<U>(a);
  const U sign = std::is_signed_v<T> ? (u >> std::min(position + length - 1, bits - 1)) & 1 : 0;
  U field = position < bits ? u >> position : 0;
  if (length < bits) field &= (U{1} << length) - 1;
  const uint32_t valid = position < bits ? std::min(length, bits - position) : 0;
  if (sign && valid < bits) field |= ~U{0} << valid;
  return static_cast<T>(field);
}

uint32_t permuted(uint32_t a, uint32_t b, uint32_t selection) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selection >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// The low bits of a in place of b's field.
uint32_t inserted(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  if (position >= 32 || length == 0) return b;
  const uint32_t mask = (length >= 32 ? ~0u : (1u << length) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}

uint32_t logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

template <class T, class W>
void integers(Table& t, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  t["add." + type] =
      elementwise<T, T, T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); });
  t["sub." + type] =
      elementwise<T, T, T>([](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); });
  t["mul.lo." + type] = elementwise<T, T, T>([](T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  });
  t["mad.lo." + type] = elementwise<T, T, T, T>([](T a, T b, T c) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + static_cast<uint64_t>(c));
  });
  t["mul.hi." + type] = elementwise<T, T, T>([](T a, T b) { return high_half<T, W>(a, b); });
  t["div." + type] = elementwise<T, T, T>([](T a, T b) { return quotient(a, b); });
  t["rem." + type] = elementwise<T, T, T>([](T a, T b) { return remainder_of(a, b); });
  t["max." + type] = elementwise<T, T, T>([](T a, T b) { return a > b ? a : b; });
  t["min." + type] = elementwise<T, T, T>([](T a, T b) { return a < b ? a : b; });
  t["shr." + type] = elementwise<T, T, uint32_t>([](T a, uint32_t n) {
    constexpr uint32_t last = 8 * sizeof(T) - 1;
    return static_cast<T>(n <= last ? a >> n : std::is_signed_v<T> ? a >> last : 0);
  });
  t["setp.lt." + type] = comparison<T>([](T a, T b) { return a < b; });
  t["setp.le." + type] = comparison<T>([](T a, T b) { return a <= b; });
  t["setp.gt." + type] = comparison<T>([](T a, T b) { return a > b; });
  t["setp.ge." + type] = comparison<T>([](T a, T b) { return a >= b; });
  for (const auto& same : {type, "b" + type.substr(1)}) {
    t["setp.eq." + same] = comparison<T>([](T a, T b) { return a == b; });
    t["setp.ne." + same] = comparison<T>([](T a, T b) { return a != b; });
  }
  if constexpr (std::is_signed_v<T>) {
    t["neg." + type] = elementwise<T, T>([](T a) { return static_cast<T>(0 - static_cast<U>(a)); });
    t["abs." + type] = elementwise<T, T>([](T a) { return a < 0 ? static_cast<T>(0 - static_cast<U>(a)) : a; });
  }
  if constexpr (sizeof(T) >= 4)
    t["bfe." + type] =
        elementwise<T, T, uint32_t, uint32_t>([](T a, uint32_t p, uint32_t n) { return bit_field(a, p, n); });
  if constexpr (sizeof(T) <= 4) {
    t["mul.wide." + type] = elementwise<W, T, T>([](T a, T b) { return static_cast<W>(a) * static_cast<W>(b); });
    t["mad.wide." + type] = elementwise<W, T, T, W>([](T a, T b, W c) {
      return static_cast<W>(static_cast<uint64_t>(static_cast<W>(a) * static_cast<W>(b)) + static_cast<uint64_t>(c));
    });
  }
}

template <class T>
void select(Warp& w, const Instruction& i, uint32_t lanes) {
  T* d = w.reg<T>(i.o[0]);
  const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
  const uint32_t p = *w.reg<uint32_t>(i.o[3]);
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) d[lane] = p >> lane & 1 ? a[lane] : b[lane];
}

template <class T>
void bits(Table& t, const std::string& type) {
  t["and." + type] = elementwise<T, T, T>([](T a, T b) { return static_cast<T>(a & b); });
  t["or." + type] = elementwise<T, T, T>([](T a, T b) { return static_cast<T>(a | b); });
  t["xor." + type] = elementwise<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); });
  t["not." + type] = elementwise<T, T>([](T a) { return static_cast<T>(~a); });
  t["shl." + type] =
      elementwise<T, T, uint32_t>([](T a, uint32_t n) { return n < 8 * sizeof(T) ? static_cast<T>(a << n) : T{0}; });
  t["mov." + type] = elementwise<T, T>([](T a) { return a; });
  const Entry entry{&select<T>, std::string{letter<T>(), letter<T>(), letter<T>(), 'p'}};
  for (const char kind : {'b', 's', 'u', 'f'})
    t["selp." + std::string{kind} + type.substr(1)] = entry;
}

template <class F>
struct Predicate {
  static void run(Warp& w, const Instruction& i, uint32_t lanes) {
    uint32_t* d = w.reg<uint32_t>(i.o[0]);
    const uint32_t a = *w.reg<uint32_t>(i.o[1]), b = *w.reg<uint32_t>(i.o[i.count > 2 ? 2 : 1]);
    *d = (*d & ~lanes) | (F{}(a, b) & lanes);
  }
};

template <class F>
Entry predicate(F, const char* signature) {
  return {&Predicate<F>::run, signature};
}

void floats(Table& t) {
  using f = float;
  for (const char* rounding : {"", ".rn"}) {
    const std::string r = rounding;
    t["add" + r + ".f32"] = elementwise<f, f, f>([](f a, f b) { return a + b; });
    t["sub" + r + ".f32"] = elementwise<f, f, f>([](f a, f b) { return a - b; });
    t["mul" + r + ".f32"] = elementwise<f, f, f>([](f a, f b) { return a * b; });
  }
  t["div.rn.f32"] = t["div.full.f32"] = elementwise<f, f, f>([](f a, f b) { return a / b; });
  t["fma.rn.f32"] = elementwise<f, f, f, f>([](f a, f b, f c) { return std::fma(a, b, c); });
  t["sqrt.rn.f32"] = t["sqrt.approx.f32"] = elementwise<f, f>([](f a) { return std::sqrt(a); });
  t["rcp.rn.f32"] = t["rcp.approx.f32"] = elementwise<f, f>([](f a) { return 1.0f / a; });
  t["neg.f32"] = elementwise<f, f>([](f a) { return -a; });
  t["abs.f32"] = elementwise<f, f>([](f a) { return std::fabs(a); });
  t["max.f32"] = elementwise<f, f, f>(Of<larger>{});
  t["max.NaN.f32"] = elementwise<f, f, f>([](f a, f b) { return a != a || b != b ? NAN : larger(a, b); });
  t["min.NaN.f32"] = elementwise<f, f, f>([](f a, f b) { return a != a || b != b ? NAN : smaller(a, b); });
  t["min.f32"] = elementwise<f, f, f>(Of<smaller>{});
  t["ex2.approx.f32"] = elementwise<f, f>([](f a) { return static_cast<f>(std::exp2(static_cast<double>(a))); });
  t["lg2.approx.f32"] = elementwise<f, f>([](f a) { return static_cast<f>(std::log2(static_cast<double>(a))); });
  t["rsqrt.approx.f32"] =
      elementwise<f, f>([](f a) { return static_cast<f>(1.0 / std::sqrt(static_cast<double>(a))); });
  t["ex2.approx.ftz.f32"] =
      elementwise<f, f>([](f a) { return flushed(static_cast<f>(std::exp2(static_cast<double>(flushed(a))))); });
  t["rcp.approx.ftz.f32"] = elementwise<f, f>([](f a) { return flushed(1.0f / flushed(a)); });
  t["sqrt.approx.ftz.f32"] = elementwise<f, f>([](f a) { return std::sqrt(flushed(a)); });
  t["setp.lt.f32"] = comparison<f>([](f a, f b) { return a < b; });
  t["setp.le.f32"] = comparison<f>([](f a, f b) { return a <= b; });
  t["setp.gt.f32"] = comparison<f>([](f a, f b) { return a > b; });
  t["setp.ge.f32"] = comparison<f>([](f a, f b) { return a >= b; });
  t["setp.eq.f32"] = comparison<f>([](f a, f b) { return a == b; });
  t["setp.ne.f32"] = comparison<f>([](f a, f b) { return a < b || a > b; });
  t["setp.equ.f32"] = comparison<f>([](f a, f b) { return !(a < b || a > b); });
  t["setp.neu.f32"] = comparison<f>([](f a, f b) { return !(a == b); });
  t["setp.ltu.f32"] = comparison<f>([](f a, f b) { return !(a >= b); });
  t["setp.leu.f32"] = comparison<f>([](f a, f b) { return !(a > b); });
  t["setp.gtu.f32"] = comparison<f>([](f a, f b) { return !(a <= b); });
  t["setp.geu.f32"] = comparison<f>([](f a, f b) { return !(a < b); });
  t["setp.num.f32"] = comparison<f>([](f a, f b) { return a == a && b == b; });
  t["setp.nan.f32"] = comparison<f>([](f a, f b) { return a != a || b != b; });
}

}  // namespace

void add_arithmetic(Table& t) {
  integers<int16_t, int32_t>(t, "s16");
  integers<uint16_t, uint32_t>(t, "u16");
  integers<int32_t, int64_t>(t, "s32");
  integers<uint32_t, uint64_t>(t, "u32");
  integers<int64_t, __int128>(t, "s64");
  integers<uint64_t, unsigned __int128>(t, "u64");
  bits<uint16_t>(t, "b16");
  bits<uint32_t>(t, "b32");
  bits<uint64_t>(t, "b64");
  floats(t);
  t["prmt.b32"] = elementwise<uint32_t, uint32_t, uint32_t, uint32_t>(Of<permuted>{});
  t["lop3.b32"] = elementwise<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(Of<logic>{});
  t["bfi.b32"] = elementwise<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(Of<inserted>{});
  t["shf.l.wrap.b32"] = elementwise<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>((static_cast<uint64_t>(b) << 32 | a) << (n & 31) >> 32);
  });
  t["shf.r.wrap.b32"] = elementwise<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b, uint32_t n) {
    return static_cast<uint32_t>((static_cast<uint64_t>(b) << 32 | a) >> (n & 31));
  });
  t["and.pred"] = predicate([](uint32_t a, uint32_t b) { return a & b; }, "ppp");
  t["or.pred"] = predicate([](uint32_t a, uint32_t b) { return a | b; }, "ppp");
  t["xor.pred"] = predicate([](uint32_t a, uint32_t b) { return a ^ b; }, "ppp");
  t["not.pred"] = predicate([](uint32_t a, uint32_t) { return ~a; }, "pp");
  t["mov.pred"] = predicate([](uint32_t a, uint32_t) { return a; }, "pp");
}

}  // namespace ptx
