#pragma once

// The onnxruntime library, loaded when it is first needed. See cmake/FindOnnxRuntime.cmake for why it is not linked.

#define ORT_API_MANUAL_INIT  // a library that is too old is told to the user before anything of it is called
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

#include "nanochat_x/error.h"

namespace nanochat_x {

using OrtGetApiBaseFunction = const OrtApiBase*(ORT_API_CALL*)();

/// OrtGetApiBase of the library at `path`, or nullptr with the reason in `why`. The library stays loaded.
inline OrtGetApiBaseFunction load_onnxruntime(const char* path, std::string& why) {
#ifdef _WIN32
  const HMODULE library = LoadLibraryA(path);
  if (library == nullptr) {
    why = std::string(path) + ": error " + std::to_string(GetLastError());
    return nullptr;
  }
  void* symbol = reinterpret_cast<void*>(GetProcAddress(library, "OrtGetApiBase"));
#else
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    why = reason != nullptr ? reason : path;
    return nullptr;
  }
  void* symbol = dlsym(library, "OrtGetApiBase");
#endif
  if (symbol == nullptr) why = std::string(path) + " is no onnxruntime library";
  return reinterpret_cast<OrtGetApiBaseFunction>(symbol);
}

/// The library's OrtApiBase: the one that was found when this was
/// built, else the system's. Throws Error if there is none.
inline const OrtApiBase& onnxruntime_base() {
  static const OrtApiBase* const base = [] {
#ifdef _WIN32
    const char* const system_name = "onnxruntime.dll";
#elif defined(__APPLE__)
    const char* const system_name = "libonnxruntime.dylib";
#else
    const char* const system_name = "libonnxruntime.so.1";
#endif
    std::string why, ignored;
    OrtGetApiBaseFunction get = load_onnxruntime(NANOCHAT_X_ONNXRUNTIME, why);
    if (get == nullptr) get = load_onnxruntime(system_name, ignored);
    if (get == nullptr) {
      throw Error("cannot load onnxruntime (" + why + "); pip install onnxruntime, and build the runner again");
    }
    return get();
  }();
  return *base;
}

/// Makes the C++ API usable. Throws Error for a library older than the headers that this was compiled with.
inline void use_onnxruntime() {
  const std::string version = onnxruntime_base().GetVersionString();
  const std::size_t dot = version.find('.');
  std::uint32_t minor = 0;
  if (dot != std::string::npos) (void)std::from_chars(version.data() + dot + 1, version.data() + version.size(), minor);
  // GetApi would say so as well, but on standard error
  const OrtApi* api = minor < ORT_API_VERSION ? nullptr : onnxruntime_base().GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    throw Error("onnxruntime " + version + " is older than 1." + std::to_string(ORT_API_VERSION) +
                ", which this program was built for; pip install --upgrade onnxruntime, and build the runner again");
  }
  Ort::InitApi(api);
}

}  // namespace nanochat_x
