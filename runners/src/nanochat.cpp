#include "nanochat_x/nanochat.h"

#include <memory>
#include <string>
#include <utility>

#include "checks.h"
#include "nanochat_x/error.h"
#include "nanochat_x/recomputing_backend.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x {
namespace {

Bundle open_checked(const std::filesystem::path& folder) {
  Bundle bundle = Bundle::open(folder);
  check_runnable(bundle);
  bundle.verify_hashes();
  return bundle;
}

Tokenizer load_checked(const Bundle& bundle) {
  const Manifest& manifest = bundle.manifest();
  Tokenizer tokenizer = Tokenizer::load(bundle.path_of(manifest.tokenizer));
  if (tokenizer.vocab_size() != manifest.vocab_size) {
    throw Error("bundle '" + bundle.folder().string() + "': its tokenizer has " +
                std::to_string(tokenizer.vocab_size()) + " tokens and its model " +
                std::to_string(manifest.vocab_size) + "; lower the checkpoint again");
  }
  return tokenizer;
}

GenerateOptions options_of(std::int64_t max_tokens, double temperature, std::int64_t top_k) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.sampling.temperature = temperature;
  options.sampling.top_k = top_k;
  return options;
}

// The bundle's backend; a bundle without a cached program gets one that computes every sequence anew.
std::unique_ptr<Backend> open_model(const Bundle& bundle, const BackendOptions& options) {
  std::unique_ptr<Backend> backend = open_backend(bundle, options);
  if (bundle.manifest().is_cached()) return backend;
  return std::make_unique<RecomputingBackend>(std::move(backend), bundle.manifest());
}

}  // namespace

void check_runnable(const Bundle& bundle) {
  const std::string& target = bundle.manifest().target;
  // CUDA's own kernels take the weights of a bundle for `aoti` and run none of its programs, which the machine need not
  // fit.
  if (backend_name() == "cuda" && target == "aoti") return;
  if (target != backend_name()) {
    throw Error("bundle '" + bundle.folder().string() + "' is for the target '" + target + "', this program runs '" +
                backend_name() + "'; use nanochat-" + target + ", or lower again with --target " + backend_name());
  }
  bundle.check_machine(backend_version());
}

struct NanoChat::Impl {
  Impl(const std::filesystem::path& folder, const BackendOptions& options)
      : bundle(open_checked(folder)),
        tokenizer(load_checked(bundle)),
        backend(open_model(bundle, options)),
        engine(*backend, bundle.manifest(), tokenizer) {}

  Bundle bundle;
  Tokenizer tokenizer;
  std::unique_ptr<Backend> backend;
  Engine engine;
};

NanoChat::NanoChat(const std::filesystem::path& bundle, const BackendOptions& options)
    : impl_(std::make_unique<Impl>(bundle, options)) {}
NanoChat::~NanoChat() = default;
NanoChat::NanoChat(NanoChat&&) noexcept = default;
NanoChat& NanoChat::operator=(NanoChat&&) noexcept = default;

const Manifest& NanoChat::manifest() const { return impl_->bundle.manifest(); }
const Tokenizer& NanoChat::tokenizer() const { return impl_->tokenizer; }
Backend& NanoChat::backend() { return *impl_->backend; }
Engine& NanoChat::engine() { return impl_->engine; }
Session NanoChat::new_session(std::int64_t rows) { return Session(backend(), manifest(), rows); }

Logits NanoChat::forward(const std::vector<TokenId>& ids, std::int64_t batch) {
  if (ids.empty() || batch < 1 || std::ssize(ids) % batch != 0) {
    throw Error(std::to_string(ids.size()) + " token ids are not " + std::to_string(batch) +
                " sequences of one length, at least 1");
  }
  const std::int64_t length = std::ssize(ids) / batch;
  check_fits("sequence", length, manifest().max_seq_len);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    check_id(ids[i], manifest().vocab_size, [&] { return place(static_cast<std::int64_t>(i), length); });
  }
  return backend().forward(ids, batch, length);
}

std::string NanoChat::generate(std::string_view prompt, std::int64_t max_tokens, double temperature, std::int64_t top_k,
                               const OnText& on_text) {
  std::vector<TokenId> ids = tokenizer().encode(prompt);
  ids.insert(ids.begin(), tokenizer().special().bos);
  return run(ids, options_of(max_tokens, temperature, top_k), on_text);
}

std::string NanoChat::reply(std::string_view user, std::int64_t max_tokens, double temperature, std::int64_t top_k,
                            const OnText& on_text) {
  Conversation conversation(tokenizer());
  conversation.add_user(user);
  return run(conversation.ids(), options_of(max_tokens, temperature, top_k), on_text);
}

std::string NanoChat::run(const std::vector<TokenId>& prompt, const GenerateOptions& options, const OnText& on_text) {
  const SpecialTokens& special = tokenizer().special();
  std::string text;
  const auto emit = [&](const std::string& piece) {
    if (piece.empty()) return;
    text += piece;
    if (on_text) on_text(piece);
  };
  Utf8Stream characters;
  engine().generate(prompt, options, [&](std::int64_t, TokenId id, bool) {
    if (id != special.assistant_end && id != special.bos) emit(characters.push(tokenizer().token_bytes(id)));
  });
  emit(characters.finish());
  return text;
}

}  // namespace nanochat_x
