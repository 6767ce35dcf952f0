#include "api/values.h"

#include "pool/array_wire.h"

namespace torchshm::api {
namespace {

Status damaged(const char* why) { return Status(Code::kInvalid, why); }

// A list of integers, each at least `least`.
bool integers(const Json* json, int64_t least, std::vector<int64_t>& to) {
  if (json == nullptr || !json->is(Json::Kind::kArray)) return false;
  for (const Json& each : json->items) {
    if (!each.is(Json::Kind::kInteger) || each.integer < least) return false;
    to.push_back(each.integer);
  }
  return true;
}

bool count(const Json* json, int64_t& to) {
  if (json == nullptr || !json->is(Json::Kind::kInteger) || json->integer < 0) return false;
  to = json->integer;
  return true;
}

bool truth(const Json* json) { return json != nullptr && json->is(Json::Kind::kBool) && json->integer != 0; }

const std::string* text_of(const Json* json) {
  return json != nullptr && json->is(Json::Kind::kString) ? &json->text : nullptr;
}

Status parse_dtype(const Json* node, Leaf& leaf) {
  if (node == nullptr) return damaged("an array without a dtype");
  if (const std::string* text = text_of(node)) {
    const auto type = parse_type_string(*text);
    if (!type) return damaged("an unknown dtype");
    leaf.row = type->row;
    leaf.item_size = type->item_size;
    if (leaf.row == nullptr) leaf.unfit = "C++ has no type for its dtype " + *text;
    return {};
  }
  if (const std::string* name = text_of(node->find("ml"))) {
    leaf.row = row_of_name(*name);
    if (leaf.row != nullptr) {
      leaf.item_size = leaf.row->dtype.size();
    } else {
      leaf.unfit = "C++ has no type for its dtype " + *name;  // and its size is not known here
    }
    return {};
  }
  leaf.unfit = "it is a structured array";
  if (!count(node->find("itemsize"), leaf.item_size) || leaf.item_size > INT32_MAX) leaf.item_size = 0;
  return {};
}

// Where a leaf lies. REQUIRES: shape is set.
Status parse_place(const Json& json, const Json& regions, size_t blocks, Leaf& leaf) {
  const Json* number = json.find("r");
  bool empty = leaf.item_size == 0 && leaf.unfit.empty();
  for (const int64_t n : leaf.array.shape) empty |= n == 0;
  if (number == nullptr) return damaged("an array without a region");
  if (number->is(Json::Kind::kNull)) return empty ? Status() : damaged("an array without memory");
  if (empty) return damaged("an array without elements that has memory");
  int64_t index = 0;
  std::vector<int64_t> region;
  if (!count(number, index) || static_cast<uint64_t>(index) >= regions.items.size() ||
      !integers(&regions.items[static_cast<size_t>(index)], 0, region) || region.size() != 3 ||
      static_cast<uint64_t>(region[0]) >= blocks || !count(json.find("o"), leaf.offset)) {
    return damaged("a region that is not there");
  }
  leaf.region = {static_cast<uint32_t>(region[0]), static_cast<uint64_t>(region[1]), static_cast<uint64_t>(region[2])};
  if (!leaf.unfit.empty() && leaf.item_size == 0) return {};
  const auto touched = pool::reach(static_cast<int>(leaf.array.shape.size()), leaf.array.shape.data(),
                                   leaf.array.strides.data(), leaf.item_size);
  if (!touched || leaf.offset + touched->low < 0 || leaf.offset > region[2] ||
      touched->high > region[2] - leaf.offset) {
    return damaged("an array that is larger than its region");
  }
  return {};
}

Status parse_leaf(const Json& json, const Json& regions, size_t blocks, Leaf& leaf) {
  const std::string* kind = text_of(json.find("k"));
  if (kind == nullptr) return damaged("a leaf without a kind");
  if (*kind == "array") {
    if (Status parsed = parse_dtype(json.find("dtype"), leaf); !parsed) return parsed;
    if (!integers(json.find("shape"), 0, leaf.array.shape) ||
        !integers(json.find("strides"), INT64_MIN, leaf.array.strides)) {
      return damaged("an array without a shape");
    }
  } else if (*kind == "tensor") {
    const std::string* name = text_of(json.find("dtype"));
    std::vector<int64_t> steps;
    if (name == nullptr || !integers(json.find("size"), 0, leaf.array.shape) ||
        !integers(json.find("stride"), 0, steps)) {
      return damaged("a tensor without a size");
    }
    leaf.array.kind = Array::Kind::kTensor;
    leaf.array.requires_grad = truth(json.find("grad"));
    leaf.row = row_of_name(*name);
    const bool quantised = json.find("q") != nullptr;
    if (leaf.row == nullptr || quantised) {
      leaf.unfit = quantised ? "it is a quantised tensor" : "C++ has no type for its dtype torch." + *name;
    }
    leaf.item_size = leaf.row == nullptr ? 0 : leaf.row->dtype.size();
    for (const int64_t step : steps) {
      int64_t bytes = 0;
      if (__builtin_mul_overflow(step, leaf.item_size, &bytes)) return damaged("an impossible stride");
      leaf.array.strides.push_back(bytes);
    }
  } else {
    leaf.unfit = "it is a sparse tensor; save its parts, or value.to_dense()";
    return {};
  }
  if (leaf.array.shape.size() != leaf.array.strides.size()) return damaged("sizes and strides that differ in number");
  if (leaf.row != nullptr) leaf.array.dtype = leaf.row->dtype;
  return parse_place(json, regions, blocks, leaf);
}

Result<Value> parse_tree(const store::Entry& entry) {
  auto json = parse_json(std::string_view(entry.text).substr(1));
  if (!json) return std::move(json.status());
  const Json *regions = json->find("regions"), *leaves = json->find("leaves"), *tree = json->find("value");
  if (regions == nullptr || leaves == nullptr || tree == nullptr || !regions->is(Json::Kind::kArray) ||
      !leaves->is(Json::Kind::kArray)) {
    return damaged("a part of its description is missing");
  }
  Value value;
  value.kind = 'J';
  for (const Json& each : leaves->items) {
    if (Status parsed = parse_leaf(each, *regions, entry.blocks.size(), value.leaves.emplace_back()); !parsed)
      return parsed;
  }
  value.tree = *tree;
  return value;
}

Result<Value> parse_wire(const store::Entry& entry, pool::Member& member) {
  const char* wire_at = entry.text.data() + 1;
  const size_t length = entry.text.size() - 1;
  auto wire = pool::decode(wire_at, length);
  if (!wire) return std::move(wire.status());
  if (wire->carries || wire->dtype_apart || entry.blocks.size() != 1 || wire->handle.pool_id != member.pool_id() ||
      wire->handle.block != entry.blocks[0].block || wire->handle.generation != entry.blocks[0].generation ||
      !pool::intact(wire_at, length, member.arena().header().secret)) {
    return damaged("it is no array of this store");
  }
  Value value;
  value.kind = 'A';
  Leaf& leaf = value.leaves.emplace_back();
  leaf.array.shape.assign(wire->shape.begin(), wire->shape.begin() + wire->ndim);
  leaf.array.strides.assign(wire->strides.begin(), wire->strides.begin() + wire->ndim);
  leaf.item_size = wire->item_size;
  leaf.row = wire->swapped ? nullptr : row_of_number(wire->type_num, wire->item_size);
  if (leaf.row == nullptr) {
    leaf.unfit = wire->swapped ? "its bytes are in the other order"
                               : "C++ has no type for its dtype, NumPy's number " + std::to_string(wire->type_num);
  } else {
    leaf.array.dtype = leaf.row->dtype;
  }
  leaf.region = Region{0, 0, UINT64_MAX};
  if (wire->offset > INT64_MAX) return damaged("it lies outside of its block");
  leaf.offset = static_cast<int64_t>(wire->offset);
  return value;
}

std::string list(const std::vector<int64_t>& numbers, int64_t divisor) {
  std::string made;
  for (const int64_t number : numbers) {
    made += made.empty() ? '[' : ',';
    made += std::to_string(number / divisor);
  }
  return made.empty() ? "[]" : made += ']';
}

}  // namespace

Result<Value> parse(const store::Entry& entry, pool::Member& member) {
  if (!entry.text.empty() && entry.text[0] == 'A') return parse_wire(entry, member);
  if (!entry.text.empty() && entry.text[0] == 'J') return parse_tree(entry);
  Value other;
  other.kind = entry.text.empty() ? '\0' : entry.text[0];
  return other;
}

std::optional<size_t> leaf_at(const Value& value, const Json& node) {
  const Json* index = node.find("x");
  int64_t i = 0;
  if (!count(index, i) || static_cast<size_t>(i) >= value.leaves.size()) return std::nullopt;
  return static_cast<size_t>(i);
}

std::string describe(const Array& array, const TypeRow& row, const std::optional<Region>& region, int64_t offset,
                     const char* face) {
  std::string text = "J{\"regions\":[";
  if (region) text += "[0," + std::to_string(region->offset) + ',' + std::to_string(region->length) + ']';
  text += "],\"leaves\":[{";
  if (array.kind == Array::Kind::kTensor) {
    text += "\"k\":\"tensor\",\"dtype\":" + quoted(row.name) + ",\"size\":" + list(array.shape, 1) +
            ",\"stride\":" + list(array.strides, row.dtype.size()) +
            ",\"grad\":" + (array.requires_grad ? "true" : "false") + ",\"param\":false";
  } else {
    text += "\"k\":\"array\",\"dtype\":";
    if (row.number < 0) {
      text += "{\"ml\":" + quoted(row.name) + '}';
    } else {
      text += std::string(row.dtype.bits == 8 ? "\"|" : "\"<") + row.numpy + '"';
    }
    text += ",\"shape\":" + list(array.shape, 1) + ",\"strides\":" + list(array.strides, 1);
    if (face != nullptr) text += ",\"as\":" + quoted(face);
  }
  text += ",\"r\":" + std::string(region ? "0,\"o\":" + std::to_string(offset) : "null");
  return text += "}],\"value\":{\"x\":0}}";
}

}  // namespace torchshm::api
