// `_core`: host algorithms without torch. zs_fast/host.py is their door; it says what they mean and has their reference.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "zs_cpu.h"

namespace py = pybind11;

namespace {

// A view of a str's code points in their own width: no copy, no encoding, lone surrogates included.
struct Text {
  int kind;
  const void* data;
  Py_ssize_t length;
  Py_UCS4 operator[](Py_ssize_t i) const { return PyUnicode_READ(kind, data, i); }
};

struct Tag {
  Py_ssize_t start, end;
  int name;  // index into kNames; -1 for none
  bool closing;
};

constexpr const char* kNames[] = {"think", "search", "answer", "information"};
constexpr int kThink = 0, kInformation = 3;

// The first exact <name> or </name> at or after `at`.
Tag next_tag(PyObject* object, const Text& text, Py_ssize_t at) {
  while (at < text.length) {
    at = PyUnicode_FindChar(object, '<', at, text.length, 1);
    if (at == -2) throw py::error_already_set();
    if (at < 0) break;
    const bool closing = at + 1 < text.length && text[at + 1] == '/';
    for (int k = 0; k < 4; ++k) {
      Py_ssize_t i = at + (closing ? 2 : 1);
      const char* letter = kNames[k];
      while (*letter && i < text.length && text[i] == static_cast<Py_UCS4>(*letter)) ++i, ++letter;
      if (!*letter && i < text.length && text[i] == '>') return {at, i + 1, k, closing};
    }
    ++at;
  }
  return {text.length, text.length, -1, false};
}

// zs_fast/search/parser.py says what this means; every tag is looked at once.
py::object first_action(const py::str& string) {
  PyObject* object = string.ptr();
  const Text text{static_cast<int>(PyUnicode_KIND(object)), PyUnicode_DATA(object), PyUnicode_GET_LENGTH(object)};
  Tag tag = next_tag(object, text, 0);
  while (tag.name >= 0) {
    const Tag opening = tag;
    tag = next_tag(object, text, tag.end);
    if (opening.closing || opening.name == kInformation) continue;
    bool holds_a_tag = false;
    while (tag.name >= 0 && !(tag.closing && tag.name == opening.name)) {
      holds_a_tag = true;
      tag = next_tag(object, text, tag.end);
    }
    if (tag.name < 0) break;
    if (opening.name != kThink && !holds_a_tag) return py::make_tuple(kNames[opening.name], opening.end, tag.start);
    tag = next_tag(object, text, tag.end);
  }
  return py::none();
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Host algorithms of zs_fast; see zs_fast/host.py.";
  module.attr("INTERFACE") = 2;  // counted up with every change of a name or argument below, as in host.py
  module.def("pack_segments", [](const std::vector<int64_t>& lengths, int64_t token_budget,
                                 const std::vector<std::vector<zs::Prefix>>& prefixes) {
    return zs::pack_segments(lengths, token_budget, prefixes);
  });
  module.def("first_action", &first_action);
}
