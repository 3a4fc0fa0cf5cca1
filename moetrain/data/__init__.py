"""Data: text to token bins once, then batches as a pure function of the step."""

from moetrain.data.bins import Corpus, TokenStream
from moetrain.data.corpus import prepare
from moetrain.data.sampler import Loader, make_loader
from moetrain.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Corpus", "Loader", "TokenStream", "Tokenizer", "load_tokenizer", "make_loader", "prepare"]
