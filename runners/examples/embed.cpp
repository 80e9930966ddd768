// A nanochat model inside a program of your own:
//
//   target_link_libraries(my_program PRIVATE nanochat_x::aoti)

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string_view>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: embed BUNDLE TEXT\n";
    return 2;
  }
  try {
    nanochat_x::NanoChat model(argv[1]);

    // The logits of a text: here, the token that the model finds most likely to follow it.
    const auto ids = model.tokenizer().encode(argv[2]);
    const nanochat_x::Logits logits = model.forward(ids);
    const auto last = logits.at(0, logits.length - 1);
    const auto best = std::max_element(last.begin(), last.end()) - last.begin();
    std::cout << "most likely next: '" << model.tokenizer().token_bytes(best) << "'\n";

    // A continuation, printed as it comes, always in whole characters.
    const auto print = [](std::string_view text) { std::cout << text << std::flush; };
    model.generate(argv[2], /*max_tokens=*/32, /*temperature=*/0.8, /*top_k=*/50, print);
    std::cout << '\n';

    // A reply to the text as a user's message; the calculator works by itself.
    std::cout << model.reply(argv[2]) << '\n';
  } catch (const nanochat_x::Error& error) {
    std::cerr << "embed: error: " << error.what() << '\n';
    return 2;
  }
  return EXIT_SUCCESS;
}
