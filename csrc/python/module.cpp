// `_core`: host algorithms without torch. zs_fast/host.py is their door; it says what they mean and has their reference.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
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

bool starts_with(const Text& text, Py_ssize_t at, const std::string& name) {
  if (text.length - at <= static_cast<Py_ssize_t>(name.size())) return false;  // the closing > must fit too
  for (size_t i = 0; i < name.size(); ++i) {
    if (text[at + static_cast<Py_ssize_t>(i)] != static_cast<unsigned char>(name[i])) return false;
  }
  return text[at + static_cast<Py_ssize_t>(name.size())] == '>';
}

py::list find_tags(const py::str& string, const std::vector<std::string>& names) {
  PyObject* object = string.ptr();
  const Text text{static_cast<int>(PyUnicode_KIND(object)), PyUnicode_DATA(object), PyUnicode_GET_LENGTH(object)};
  py::list found;
  Py_ssize_t at = 0;
  while (at < text.length) {
    at = PyUnicode_FindChar(object, '<', at, text.length, 1);
    if (at == -2) throw py::error_already_set();
    if (at < 0) break;
    const bool closing = at + 1 < text.length && text[at + 1] == '/';
    const Py_ssize_t name_at = at + (closing ? 2 : 1);
    Py_ssize_t end = at + 1;
    for (size_t k = 0; k < names.size(); ++k) {
      if (!starts_with(text, name_at, names[k])) continue;
      end = name_at + static_cast<Py_ssize_t>(names[k].size()) + 1;
      found.append(py::make_tuple(at, end, k, closing));
      break;
    }
    at = end;
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Host algorithms of zs_fast; see zs_fast/host.py.";
  module.def("pack_segments", [](const std::vector<int64_t>& lengths, int64_t token_budget) {
    return zs::pack_segments(lengths, token_budget);
  });
  module.def("find_tags", &find_tags);
}
