// What the engine has to know of every operation besides its kernel. The table comes from operations.py.
#ifndef POMONA_OPERATIONS_H
#define POMONA_OPERATIONS_H

#include <cstdint>
#include <limits>

#include "operations.inc"
#include "pomona_net.h"

namespace pomona {

// A layer has a matrix of weights, whose zeros are skipped; an elementwise operation is a function of each number.
enum Kind { kLayer, kElementwise, kOther };

// In int16 the unit of a result: its own, by its range; the largest of that and those of the operands; the operand's.
enum UnitRule { kOwn, kLargest, kOperand };

struct Traits {
  int32_t least_operands, most_operands;
  uint64_t takes;       // dtypes of operands, one bit each
  uint64_t attributes;  // that it reads, one bit each
  Kind kind;
  UnitRule unit;
  bool keeps_zero;  // 0 yields 0; but see keeps_zero() in run.cpp
  bool is_in_place;  // the result may take the place of the first operand, where both have one shape
  bool reads(int32_t attribute) const { return (attributes >> attribute & 1) != 0; }
};

// nullptr: there is no such operation.
inline const Traits* find_traits(int32_t op) {
  switch (op) {
#define POMONA_CASE(NAME, ...)                    \
  case POMONA_##NAME: {                           \
    static constexpr Traits traits{__VA_ARGS__};  \
    return &traits;                               \
  }
    POMONA_EACH_OPERATION(POMONA_CASE)
#undef POMONA_CASE
    default: return nullptr;
  }
}

// Of an operation that exists.
inline const Traits& traits_of(int32_t op) { return *find_traits(op); }

// Those that a node does not have keep these values.
struct Attributes {
  int32_t weight = -1, bias = -1;
  int32_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int32_t groups = 1;
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  bool ceil = false, count_padding = false;
};

inline void read_attribute(const pomona_attribute& from, int32_t* to) { *to = from.value.integers[0]; }
inline void read_attribute(const pomona_attribute& from, bool* to) { *to = from.value.integers[0] != 0; }
inline void read_attribute(const pomona_attribute& from, float* to) { *to = from.value.numbers[0]; }
inline void read_attribute(const pomona_attribute& from, int32_t (*to)[2]) {
  (*to)[0] = from.value.integers[0];
  (*to)[1] = from.value.integers[1];
}

// The attributes of a node with these traits. False: there is one that the operation does not read, or one twice.
inline bool read_attributes(const pomona_attribute* from, int32_t num, const Traits& traits, Attributes* to) {
  uint64_t seen = 0;
  for (int32_t i = 0; i < num; ++i) {
    const int32_t name = from[i].name;
    if (name < 0 || name >= POMONA_NUM_ATTRIBUTES || !traits.reads(name) || (seen >> name & 1) != 0) return false;
    seen |= uint64_t{1} << name;
    switch (name) {
#define POMONA_CASE(NAME, field) \
  case POMONA_ATTRIBUTE_##NAME: read_attribute(from[i], &to->field); break;
      POMONA_EACH_ATTRIBUTE(POMONA_CASE)
#undef POMONA_CASE
      default: return false;
    }
  }
  return true;
}

}  // namespace pomona

#endif
