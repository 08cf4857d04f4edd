// exp and log for loops that the compiler turns into vectors: no branches, no calls. Each errs by an ulp or two on
// the arguments that it is made for, and keeps what is not a number.
#pragma once

#include <cstdint>
#include <cstring>

namespace memloc {

template <typename E>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kLowest = -87;                                      // above it, exp is a normal number
  static constexpr float kRound = 0x1.8p23f;                                 // adding it rounds to an integer
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;  // a product with the high part is exact
  static constexpr int kExpTerms = 7, kLogTerms = 5;
};
template <>
struct FloatFormat<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kLowest = -708;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kExpTerms = 13, kLogTerms = 11;
};

template <typename To, typename From>
inline To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename E>
constexpr E inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<E>(1 / product);
}

template <typename E, int kTerm>
inline E exp_series(E r) {
  if constexpr (kTerm == FloatFormat<E>::kExpTerms) {
    return inverse_factorial<E>(kTerm);
  } else {
    constexpr E coefficient = inverse_factorial<E>(kTerm);
    return coefficient + r * exp_series<E, kTerm + 1>(r);
  }
}

// exp(x) for x <= 0; where that would be smaller than exp(kLowest), this.
template <typename E>
inline E exp_nonpositive(E x) {
  using F = FloatFormat<E>;
  using Bits = typename F::Bits;
  const E bounded = x < F::kLowest ? F::kLowest : x;
  const E shifted = bounded * static_cast<E>(1.4426950408889634) + F::kRound;  // x = n ln 2 + r
  const E n = shifted - F::kRound;
  const E r = (bounded - n * F::kLn2High) - n * F::kLn2Low;
  const Bits exponent = bits_as<Bits>(shifted) - bits_as<Bits>(F::kRound);
  const E scale = bits_as<E>((exponent << F::kMantissa) + bits_as<Bits>(E{1}));
  return exp_series<E, 0>(r) * scale;
}

// (1 + t^2 / 3 + t^4 / 5 + ...), of square = t^2
template <typename E, int kTerm>
inline E log_series(E square) {
  constexpr E coefficient = static_cast<E>(1.0 / (2 * kTerm + 1));
  if constexpr (kTerm + 1 == FloatFormat<E>::kLogTerms) {
    return coefficient;
  } else {
    return coefficient + square * log_series<E, kTerm + 1>(square);
  }
}

// log(x) for finite x >= 1.
template <typename E>
inline E log_from_one(E x) {
  using F = FloatFormat<E>;
  using Bits = typename F::Bits;
  const Bits bits = bits_as<Bits>(x);
  const Bits exponent = (bits - bits_as<Bits>(static_cast<E>(0.7071067811865476))) >> F::kMantissa;
  const E mantissa =
      bits_as<E>(bits - (exponent << F::kMantissa));  // x = 2^n mantissa, that between 1/sqrt 2 and sqrt 2
  const E t = (mantissa - 1) / (mantissa + 1);        // log mantissa = 2 artanh t
  const E n = static_cast<E>(exponent);
  const E value = n * F::kLn2High + (2 * t * log_series<E, 0>(t * t) + n * F::kLn2Low);
  return x == x ? value : x;
}

}  // namespace memloc
