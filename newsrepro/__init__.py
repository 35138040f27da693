"""Given a news article, rank a pool of images so that the one published with it comes first.

The names a user needs; each is loaded when it is first asked for, so that `import newsrepro` is quick."""
__version__ = "0.1.0"

from importlib import import_module

_HOMES = {
    'core.base': ('InputError',),
    'core.checkpoints': ('find_backbone',),
    'data.layouts': ('read_collection', 'check_data'),
    'data.fetch': ('fetch_images',),
    'models.loader': ('load_encoder',),
    'models.store': ('EmbeddingStore', 'embed'),
    'ranking.metrics': ('rank_of_truth', 'summarise'),
    'ranking.one_to_one': ('dual_softmax_top_k', 'assign'),
    'ranking.retrieve': ('top_k', 'ranked_lists'),
    'ranking.runs': ('read_run', 'write_run', 'evaluate_files', 'compare_files', 'fuse_files'),
    'rematching': ('rematch',),
    'study.reproduce': ('reproduce',),
    'study.verify': ('verify',),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__(): return sorted({*globals(), *__all__})
