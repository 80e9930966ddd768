#pragma once

#include <cstdint>
#include <string_view>

#include "../tests/temp_dir.h"
#include "demand.h"
#include "nanochat_x/safetensors.h"
#include "safetensors_format.h"

namespace nanochat_x::fuzz {

/// A safetensors file: refused in one line, or tensors that can be read, aligned, of the size that their shape says.
template <typename Open>
void check_safetensors(std::string_view bytes, const Open& open) {
  static const test::TempDir folder;
  const auto file = folder / "x.safetensors";
  test::write_file(file, bytes);
  SafetensorsFile opened;
  const auto refused = refusal([&] { opened = open(file); });
  if (refused) {
    demand(refused->starts_with(file.string()), "an error names the file");
    return;
  }
  volatile unsigned touched = 0;  // that all of it is there is seen by reading it
  std::size_t total = 0;
  for (const auto& [name, tensor] : opened.tensors()) {
    const auto element = internal::element_bytes(tensor.dtype);
    demand(element.has_value(), "a dtype is known");
    const auto size = internal::tensor_bytes(tensor.shape, *element);
    demand(size.has_value() && *size == tensor.data.size(), "data are as long as dtype and shape say");
    demand(reinterpret_cast<std::uintptr_t>(tensor.data.data()) % *element == 0, "data are aligned");
    total += tensor.data.size();
    demand(total <= bytes.size(), "tensors lie within the file");
    for (const std::byte byte : tensor.data) touched = touched + std::to_integer<unsigned>(byte);
  }
}

inline void check_safetensors(std::string_view bytes) {
  check_safetensors(bytes, [](const auto& file) { return SafetensorsFile::open(file); });
}

}  // namespace nanochat_x::fuzz
