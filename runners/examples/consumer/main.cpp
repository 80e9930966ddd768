// Answers one question: consumer BUNDLE QUESTION

#include <iostream>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: consumer BUNDLE QUESTION\n";
    return 2;
  }
  try {
    nanochat_x::NanoChat model(argv[1]);
    std::cout << model.reply(argv[2], /*max_tokens=*/96, /*temperature=*/0) << '\n';
  } catch (const nanochat_x::Error& error) {
    std::cerr << "consumer: error: " << error.what() << '\n';
    return 2;
  }
}
