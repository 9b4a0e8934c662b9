"""What a job can see of its cache without loading a model: whether anything is missing, or was made differently."""

from preprocess.config import PreprocessConfig
from shared.cache.dataset import Cache, Provenance, check_has_clips
from shared.cache.layout import DATASET_FILE, LATENT_STREAM, null_caption_file
from shared.cache.schema import FORMAT_VERSION
from shared.encoders.location import require_model
from shared.errors import InputError
from shared.stores.open import open_store


def settled_cache(config: PreprocessConfig) -> Cache | None:
    """Returns the job's cache if it has all streams of the job, made by models of the same names and the same options.

    Else there is something to encode, or to complain of, and workers find out. Weights are compared when they are
    loaded: a model of the same name and other weights is noticed by the first job that has something to encode.

    Args:
        config: The job's options, resolved.
    """
    if open_store(config.output).size(DATASET_FILE) is None:
        return None
    try:
        cache = Cache.open(config.output)
    except InputError:
        return None
    if cache.version != FORMAT_VERSION or not all(stream in cache.provenance for stream in config.streams()):
        return None
    for stream, ours in _provenance_of_options(config).items():
        if stream != LATENT_STREAM and cache.store.size(null_caption_file(stream)) is None:
            return None
        theirs = cache.provenance[stream]
        if any(theirs.get(key) != value for key, value in ours.items()):
            return None
    return cache


def check_settings(config: PreprocessConfig) -> None:
    """Checks that the job's options are those that its cache was made with, if there is one.

    Models may have several names, and the precision be left to the device: workers compare those.

    Args:
        config: The job's options, resolved.

    Raises:
        InputError: naming all that differs; if the output is not a cache; or if there is none to add texts to.
    """
    store = open_store(config.output)
    check_has_clips(store, config.streams())
    if store.size(DATASET_FILE) is None:
        return
    cache = Cache.open(config.output)
    if cache.version == FORMAT_VERSION:  # others are refused by who would extend them
        cache.require_settings(_provenance_of_options(config))


def check_models(config: PreprocessConfig) -> None:
    """Checks that there are the models of streams that the cache does not have yet, before clips are probed.

    A folder that this machine does not have may be on those of the workers, who find out.

    Args:
        config: The job's options, resolved.

    Raises:
        InputError: if one is not there; or if the output is not a cache.
    """
    there = Cache.open(config.output).provenance if open_store(config.output).size(DATASET_FILE) is not None else {}
    for stream in config.streams():
        name = "vae" if stream == LATENT_STREAM else "text_encoder"
        if stream not in there:
            require_model(getattr(config, name), option=f"--{name.replace('_', '-')}", is_here=False)


def _provenance_of_options(config: PreprocessConfig) -> Provenance:
    """Returns what the options alone say of what makes the job's streams."""
    codecs, made = config.codecs(), Provenance()
    for stream in config.streams():
        ours = made[stream] = {"codec": str(codecs[stream])}
        if stream == LATENT_STREAM:
            ours |= {"model": config.vae, "posterior": config.posterior}
            if config.vae_micro_batch is not None:
                ours |= {"micro_batch": config.vae_micro_batch}
        else:
            ours |= {"model": config.text_encoder, "max_tokens": config.max_tokens, "cleaning": config.cleaning}
        if config.precision != "auto":
            ours |= {"precision": config.precision}
    return made
