// The emulation as a Python module on numpy arrays, for tests. bf16 and fp16 arrays are uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "nasa_emu.h"
#include "selftest.h"
#include "settings.h"

namespace py = pybind11;

namespace snoopi {
namespace {

using emulation::machine;

// [{fault, site, detail, count}], and clears them.
py::list take_reports() {
  py::list list;
  for (const emulation::Report& report : machine.reports.list()) {
    py::dict item;
    item["fault"] = emulation::name(report.fault);
    item["site"] = report.site.str();
    item["detail"] = report.detail;
    item["count"] = report.count;
    list.append(item);
  }
  machine.reports.clear();
  return list;
}

py::dict take_counts() {
  const emulation::Counts& counts = machine.counts;
  py::dict result;
  result["products"] = counts.products;
  result["matrices"] = counts.matrices;
  result["barriers"] = counts.barriers;
  result["copies"] = counts.copies;
  result["switches"] = counts.switches;
  const auto pair = [](const emulation::Traffic& t) { return py::make_tuple(t.cost, t.ideal); };
  result["shared"] = pair(counts.shared);
  result["loads"] = pair(counts.loads);
  result["stores"] = pair(counts.stores);
  py::dict sites;
  for (const auto& [where, traffic] : counts.sites) {
    sites[py::make_tuple(where.first, where.second)] = pair(traffic);
  }
  result["sites"] = sites;
  machine.counts = {};
  return result;
}

py::dict run_selftest(const std::string& wanted, const py::dict& settings) {
  int num = 0;
  const selftest::Case* cases = selftest::cases(num);
  for (int i = 0; i < num; ++i) {
    if (wanted != cases[i].name) continue;
    emulation::start(settings);
    py::array_t<float> in(4 * selftest::kThreads), out(cases[i].written);
    py::array_t<uint16_t> a({16, 16}), b({8, 16});
    for (int j = 0; j < 4 * selftest::kThreads; ++j) in.mutable_data()[j] = static_cast<float>(j);
    for (int j = 0; j < 256; ++j) {
      const auto element = emulation::narrow<BFloat16>(static_cast<float>((j * 37) % 101 - 50));
      a.mutable_data()[j] = element.bits;
      if (j < 128) b.mutable_data()[j] = element.bits;
    }
    machine.global.add_input("in", in.data(), in.nbytes());
    machine.global.add_input("a", a.data(), a.nbytes());
    machine.global.add_input("b", b.data(), b.nbytes());
    machine.global.add_output("out", out.data(), out.nbytes(), sizeof(float));
    const int error = cases[i].launch({in.data(), out.mutable_data(), a.data(), b.data()});
    if (error == 0) machine.global.check_all_written();
    py::dict result;
    result["error"] = error;
    result["reports"] = take_reports();
    result["counts"] = take_counts();
    result["out"] = out;
    result["a"] = a;
    result["b"] = b;
    return result;
  }
  throw py::key_error("no self-test is called " + wanted);
}

int dtype_of(const std::string& name) {
  if (name == "fp16") return kHalf;
  if (name == "bf16") return kBFloat16;
  if (name == "fp32") return kFloat;
  throw py::value_error("dtype must be fp16, bf16 or fp32, got " + name);
}

// The bytes that an array of any strides touches, for the bounds check.
void add_input(const char* name, const py::array& x) {
  int64_t last = x.itemsize();
  for (int i = 0; i < x.ndim(); ++i) last += (x.shape(i) - 1) * x.strides(i);
  machine.global.add_input(name, x.data(), static_cast<size_t>(last));
}

// The strides of dimensions 0 to 2, in elements.
void set_strides(const py::array& x, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = x.strides(i) / x.itemsize();
}

// q [b m h d]; texts [(k, v, mask or None)], k and v [b n h d], mask uint8 [b n]; batches may have
// stride 0. options: see below. Memory is neither copied nor aligned.
struct Call {
  NasaParams params = {};
  int dtype, head_dim;

  Call(const py::array& q, const py::list& texts, const py::dict& options)
      : dtype(dtype_of(options["dtype"].cast<std::string>())),
        head_dim(static_cast<int>(q.shape(3))) {
    params.q = q.data();
    set_strides(q, params.q_stride);
    params.b = q.shape(0);
    params.m = q.shape(1);
    params.h = q.shape(2);
    params.num_texts = static_cast<int>(texts.size());
    for (int i = 0; i < std::min(params.num_texts, kMaxTexts); ++i) {
      set_text(texts[i].cast<py::tuple>(), params.texts[i]);
    }
    params.twin = has(options, "twin") && options["twin"].cast<bool>();
    params.softmax_scale = options["softmax_scale"].cast<float>();
    params.nasa_scale = has(options, "nasa_scale") ? options["nasa_scale"].cast<float>() : 0.0f;
    if (has(options, "strength")) {
      const py::array strength = options["strength"].cast<py::array_t<float>>();
      params.strength = static_cast<const float*>(strength.data());
      for (int i = 0; i < 2; ++i) params.strength_stride[i] = strength.strides(i) / 4;
    }
    if (has(options, "w_out")) {
      const py::array w = options["w_out"].cast<py::array>();
      params.w_out = w.data();
      params.c_out = w.shape(0);
    }
    if (has(options, "b_out")) params.b_out = options["b_out"].cast<py::array>().data();
  }

  static bool has(const py::dict& options, const char* name) {
    return options.contains(name) && !options[name].is_none();
  }

  static void set_text(const py::tuple& from, NasaText& text) {
    const py::array k = from[0].cast<py::array>(), v = from[1].cast<py::array>();
    text.k = k.data();
    text.v = v.data();
    text.n = k.shape(1);
    set_strides(k, text.k_stride);
    set_strides(v, text.v_stride);
    if (from[2].is_none()) return;
    const py::array mask = from[2].cast<py::array>();
    text.mask = static_cast<const uint8_t*>(mask.data());
    text.mask_stride = mask.strides(0);
  }

  static void add_inputs(const py::array& q, const py::list& texts, const py::dict& options) {
    add_input("q", q);
    for (const auto& item : texts) {
      const py::tuple text = item.cast<py::tuple>();
      add_input("k", text[0].cast<py::array>());
      add_input("v", text[1].cast<py::array>());
      if (!text[2].is_none()) add_input("mask", text[2].cast<py::array>());
    }
    for (const char* name : {"strength", "w_out", "b_out"}) {
      if (has(options, name)) add_input(name, options[name].cast<py::array>());
    }
  }
};

// An output full of NaN, at a multiple of 128 bytes.
py::array output(const char* name, std::vector<py::ssize_t> shape, size_t itemsize) {
  size_t bytes = itemsize;
  for (const py::ssize_t size : shape) bytes *= static_cast<size_t>(size);
  void* memory = aligned_alloc(128, (bytes + 127) / 128 * 128);
  memset(memory, 0xff, bytes);
  machine.global.add_output(name, memory, bytes, itemsize);
  const py::capsule owner(memory, free);
  const py::dtype type = itemsize == 4 ? py::dtype::of<float>() : py::dtype::of<uint16_t>();
  return py::array(type, shape, {}, memory, owner);
}

// options: dtype, softmax_scale, nasa_scale or strength [b m], w_out, b_out, twin, lse (whether it
// is wanted). Returns {error, reports, counts, out, lse}.
py::dict run_nasa(const py::array& q, const py::list& texts, const py::dict& options,
                  const py::dict& settings) {
  emulation::start(settings);
  Call call(q, texts, options);
  Call::add_inputs(q, texts, options);
  NasaParams& p = call.params;
  const size_t itemsize = call.dtype == kFloat ? 4 : 2;
  std::vector<py::ssize_t> shape = {p.b, p.m, p.h, q.shape(3)};
  if (p.w_out != nullptr) shape = {p.b, p.m, p.c_out};
  py::list out, lse;
  static const char* const names[2][kMaxTexts] = {{"out", "second out", ""},
                                                  {"lse", "second lse", "third lse"}};
  for (int i = 0; i < (p.twin ? 2 : 1); ++i) {
    const py::array x = output(names[0][i], shape, itemsize);
    p.out[i] = const_cast<void*>(x.data());
    out.append(x);
  }
  const bool lse_wanted = Call::has(options, "lse") && options["lse"].cast<bool>();
  for (int i = 0; lse_wanted && i < p.num_texts; ++i) {
    const py::array x = output(names[1][i], {p.b, p.m, p.h}, 4);
    p.lse[i] = static_cast<float*>(const_cast<void*>(x.data()));
    lse.append(x);
  }
  const int error = snoopi_nasa_emulated(&p, call.dtype, call.head_dim, nullptr);
  if (error == kOk) machine.global.check_all_written();
  py::dict result;
  result["error"] = snoopi_nasa_emulated_error(error);
  result["reports"] = take_reports();
  result["counts"] = take_counts();
  result["out"] = out;
  result["lse"] = lse;
  return result;
}

// What the call would launch with so much shared memory; or its error's name.
py::object query_nasa(const py::array& q, const py::list& texts, const py::dict& options,
                      int shared_limit) {
  alignas(16) static char nothing[16];
  Call call(q, texts, options);
  call.params.out[0] = call.params.out[1] = nothing;
  NasaInstance found = {};
  const int error =
      snoopi_nasa_emulated_query(&call.params, call.dtype, call.head_dim, shared_limit, &found);
  if (error != kOk) return py::str(snoopi_nasa_emulated_error(error));
  py::dict result;
  result["rows"] = found.rows;
  result["threads"] = found.threads;
  result["key_tile"] = found.key_tile;
  result["stages"] = found.stages;
  result["single"] = found.single != 0;
  result["project"] = found.project != 0;
  result["shared_bytes"] = found.shared_bytes;
  result["blocks"] = found.blocks;
  return result;
}

// Whether the call should get a projection to c_out channels on such a device.
bool projects_on(const py::array& q, const py::list& texts, const py::dict& options, int c_out,
                 int processors, int capability) {
  const Call call(q, texts, options);
  return snoopi_nasa_emulated_projects_on(&call.params, call.dtype, call.head_dim, c_out,
                                          processors, capability) != 0;
}

}  // namespace
}  // namespace snoopi

PYBIND11_MODULE(snoopi_simt, m) {
  m.doc() = "csrc/cuda's kernels run on the host, with every access checked";
  m.def("nasa", &snoopi::run_nasa, py::arg("q"), py::arg("texts"), py::arg("options"),
        py::arg("settings") = py::dict());
  m.def("query", &snoopi::query_nasa, py::arg("q"), py::arg("texts"), py::arg("options"),
        py::arg("shared_limit"));
  m.def("projects", &snoopi::projects_on, py::arg("q"), py::arg("texts"), py::arg("options"),
        py::arg("c_out"), py::arg("processors"), py::arg("capability"));
  m.def("selftest", &snoopi::run_selftest, py::arg("name"), py::arg("settings") = py::dict());
  m.def("selftests", [] {
    int num = 0;
    const snoopi::selftest::Case* cases = snoopi::selftest::cases(num);
    std::vector<std::string> names;
    for (int i = 0; i < num; ++i) names.push_back(cases[i].name);
    return names;
  });
}
