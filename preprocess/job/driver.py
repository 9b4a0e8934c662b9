"""The driver: probing, planning, encoding, and what is said at the end."""

import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from preprocess.config import PreprocessConfig
from preprocess.dry_run import cache_to_plan, check_sizes, dry_run, planned_bytes, shortage
from preprocess.events import Ended, Planned, Started
from preprocess.job import cluster
from preprocess.job.dashboard import Dashboard
from preprocess.job.pool import Pool
from preprocess.job.probing import ProbingDone, probe_all
from preprocess.job.settled import check_models, check_settings, settled_cache
from preprocess.job.shards import TOLD, ShardPass
from preprocess.job.urls import resolved_url, written_url
from preprocess.messages import MicroBatch
from preprocess.partition import Partition
from preprocess.report import EARLIER, JobReport, Limit
from preprocess.run_folder import RunFolder
from preprocess.summary import SUMMARY_FILE, library_versions, summary_json
from preprocess.tally import Tally
from preprocess.timeline import TIMELINE_FILE, parse
from preprocess.watch import Watch
from preprocess.work import Work, find_work
from shared.cache.card import write_card
from shared.cache.dataset import Cache, Provenance, check_is_cache_or_empty
from shared.cache.layout import DATASET_FILE, LATENT_STREAM, PROBE_FOLDER
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.schema import FORMAT_VERSION
from shared.cache.shared_texts import SharedTexts
from shared.clips.decode import MENDABLE, OUTDATED, Postponed
from shared.clips.plan import ShardTasks
from shared.clips.probes import Probes, ProbeTasks
from shared.clips.reasons import untaken_note
from shared.errors import InputError
from shared.media.manifest import read_manifest
from shared.stores.files import free_bytes
from shared.stores.open import open_store

_REFUSALS_AT_ONCE = 50_000
_FEW_CLIPS = 1000
_PICTURE_FILE = "timeline.png"
_LATER_SECONDS = 30.0
"""After which clips are tried once more that could not be had."""


def run_job(config: PreprocessConfig) -> JobReport:
    """Runs stage 1 and returns its figures.

    Raises:
        InputError: for what the user gave: manifest, models, buckets, output.
    """
    job = _Job(config)
    with cluster.joined_cluster(config.address):
        return job.run()


def describe_job(config: PreprocessConfig) -> str:
    """Returns a table of what :func:`run_job` would do. Clips are probed; nothing is encoded.

    Raises:
        InputError: as :func:`run_job` does.
    """
    job = _Job(config)
    with cluster.joined_cluster(config.address):
        return job.describe()


class _Job:
    """One run.

    Args:
        config: Its options.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        config = config.resolved()
        self._config = replace(
            config,
            manifest=resolved_url(config.manifest),
            output=written_url("output", config.output),
            probes=None if config.probes is None else written_url("probes", config.probes),
        )
        check_is_cache_or_empty(open_store(self._config.output))
        check_settings(self._config)
        check_models(self._config)
        check_sizes(self._config)
        self._manifest = read_manifest(
            self._config.manifest, columns=config.column_mapping(), ignore=config.ignore_columns
        )
        self._manifest.require_usable(config.manifest)
        if config.partition is not None:
            self._manifest = Partition.parse(config.partition).of(self._manifest)
        self._planned = cache_to_plan(self._config) if config.dry_run else None
        self._tally, self._started = Tally(), time.time()
        self._refusals: list[Refusal] = []
        """Of clips that could not be probed."""
        self._report = JobReport(
            num_rows=self._manifest.num_rows,
            num_clips=len(self._manifest.clips),
            tally=self._tally,
            max_refused=Limit.parse(config.max_refused),
        )

    def describe(self) -> str:
        """Probes and plans."""
        self._watch = Watch(Dashboard().note)
        cache = self._planned
        assert cache is not None
        probes, tasks = self._to_probe()
        self._probe(probes, tasks, None)
        work = self._plan(probes, cache)
        self._tally.refuse([*self._refused_rows(), *self._refusals])
        return dry_run(
            work,
            self._config,
            cache.provenance,
            self._tally,
            num_gpus=int(cluster.num_gpus()),
            free_bytes=self._free_bytes(),
        )

    def _free_bytes(self) -> int | None:
        """Returns what is free on the disk of the cache; None if it is in an object store, or the disk does not say."""
        if "://" in self._config.output:
            return None
        try:
            return free_bytes(Path(self._config.output))
        except OSError:  # it is only told
            return None

    def _tell_room(self, work: Work, cache: Cache) -> None:
        """Says it if the disk may not hold what is planned."""
        if told := shortage(planned_bytes(work, self._config, cache.provenance), self._free_bytes(), cache.url):
            print(told, file=sys.stderr)

    def run(self) -> JobReport:
        """Probes, plans, encodes. Where nothing is missing, no worker is started."""
        self._watch = Watch(Dashboard().note)
        self._watch.listen()
        self._watch.log(Started(config=asdict(self._config), versions=library_versions()))
        work: Work | None = None
        pool: Pool | None = None
        with ExitStack() as at_end:
            probes, tasks = self._to_probe()
            cache = settled_cache(self._config) if tasks is None or self._are_few(tasks) else None
            if cache is not None:
                self._probe(probes, tasks, None)
                work = self._plan(probes, cache)
            if work is None or not work.is_nothing:
                pool = Pool(self._config, self._manifest.root, self._known_micro_batch(), self._watch)
                at_end.callback(pool.close)
                print(pool.announcement(), file=sys.stderr)
                if work is None:
                    self._probe(probes, tasks, pool)
                cache = self._open_cache(pool)
            if cache is None:
                self._tally.leave(TOLD, len(self._manifest.clips) - self._tally.pending.total())
                return self._final_report()
            self._do_and_tell(work, pool, probes, cache)
        return self._final_report()

    def _do_and_tell(self, work: Work | None, pool: Pool | None, probes: Probes | None, cache: Cache) -> None:
        """Does what is to be done, and leaves the events and figures of the run in its folder."""
        run = RunFolder(cache.store)
        self._watch.attach(run)
        self._report = replace(self._report, run_url=run.url, output=self._config.output)
        reason, code = "it was ended by an error that is a defect of this program", 1
        try:
            self._do(work or self._plan(probes, cache), pool, probes, cache)
            reason = "told to end" if self._watch.told_to_end else "finished"
            code = self._final_report().exit_code
        except InputError as error:
            reason, code = str(error), 2
            raise
        except KeyboardInterrupt:
            reason, code = "interrupted", 130
            raise
        finally:
            self._close(run, reason, code)

    def _final_report(self) -> JobReport:
        """Returns the figures as they are now."""
        return replace(
            self._report,
            num_lost_workers=self._watch.num_lost,
            excluded=tuple(self._watch.excluded),
            first_samples=tuple(self._watch.first_samples),
            seconds=dict(self._watch.progress.seconds),
            workers=self._watch.timeline.totals(time.time()),
        )

    def _close(self, run: RunFolder, reason: str, code: int) -> None:
        """Leaves the figures of the run in its folder."""
        self._watch.log(Ended(exit_reason=reason, exit_code=code))
        now = time.time()
        summary = summary_json(
            self._final_report(),
            config=asdict(self._config),
            start=self._started,
            end=now,
            exit_reason=reason,
            exit_code=code,
        )
        run.write(SUMMARY_FILE, summary)
        timeline = self._watch.timeline.to_json(now)
        if has_workers := bool((drawn := parse(timeline)).workers):
            run.write(TIMELINE_FILE, timeline)
        run.close()
        if not has_workers:
            return
        try:
            from preprocess.timeline_plot import draw  # loads matplotlib: not before all else is done

            run.write(_PICTURE_FILE, draw(drawn))
        except Exception as error:  # whatever ails the picture, the job is done
            print(f"note: the timeline could not be drawn: {error}", file=sys.stderr)

    def _known_micro_batch(self) -> MicroBatch | None:
        """Returns the micro-batch of the cache, if there is one and the options ask for none."""
        if self._config.vae_micro_batch is not None or open_store(self._config.output).size(DATASET_FILE) is None:
            return None
        return MicroBatch.of(Cache.open(self._config.output).provenance[LATENT_STREAM])

    def _to_probe(self) -> tuple[Probes | None, ProbeTasks | None]:
        """Returns the probes, and what is to be probed; nothing if only texts are encoded."""
        if self._config.only_texts:
            return None, None
        probes = Probes.open(open_store(self._config.probes or f"{self._config.output}/{PROBE_FOLDER}"))
        if self._config.retry_refused:
            cache = Cache(open_store(self._config.output), {}, FORMAT_VERSION)
            refused = probes.refused(self._manifest) | Counter(cache.read_ledger()["reason"].to_pylist())
            if note := untaken_note(self._config.retry_refused, refused):
                print(note, file=sys.stderr)
        tasks = probes.missing(
            self._manifest, check_stamps=self._config.check_sources, retry_refused=self._config.retry_refused
        )
        return probes, tasks

    def _are_few(self, tasks: ProbeTasks) -> bool:
        """Returns whether probing is over so soon that workers may wait for it."""
        return tasks.num_clips <= max(_FEW_CLIPS, len(self._manifest.clips) // 100)

    def _probe(self, probes: Probes | None, tasks: ProbeTasks | None, pool: Pool | None) -> None:
        """Probes what is not probed, while workers load."""
        if probes is not None and tasks is not None:
            done = self._probe_all(probes, tasks, pool)
            self._note_unprobed(done)
            self._report = replace(self._report, num_probed=done.num_clips)

    def _probe_all(self, probes: Probes, tasks: ProbeTasks, pool: Pool | None) -> ProbingDone:
        return probe_all(
            probes,
            tasks,
            self._config.decode_timeout,
            self._watch,
            resource_seconds=self._config.resource_timeout,
            meanwhile=(lambda: None) if pool is None else pool.take_news,
        )

    def _note_unprobed(self, done: ProbingDone) -> None:
        """Takes note of clips of which nothing is known: refused if the user can mend that, else left for later."""
        if done.num_left:
            self._tally.leave(TOLD, done.num_left)
        for clip in done.postponed:
            reason, detail = clip.reason or "", clip.detail or ""
            if reason in MENDABLE:
                self._refusals.append(Refusal(source=clip.source, reason=reason, detail=detail))
            else:
                self._tally.leave(reason, example=f"{clip.source}: {detail}")

    def _open_cache(self, pool: Pool) -> Cache | None:
        """Returns the cache, made if there was none, once the first worker has loaded; None if told to end before."""
        provenance: Provenance = {}
        first = pool.first_loaded(lambda: self._watch.told_to_end)
        for loaded in first:
            provenance.update(loaded.provenance)
        if not provenance:
            return None
        print(first[0].told(on_gpu=pool.on_gpu), file=sys.stderr)
        cache = Cache.open_or_create(self._config.output, provenance)
        pool.micro_batch = MicroBatch.of(cache.provenance[LATENT_STREAM])
        pool.open(cache, lambda: self._watch.told_to_end)
        return cache

    def _do(self, work: Work, pool: Pool | None, probes: Probes | None, cache: Cache) -> None:
        """Does what is to be done; clips that could not be had are tried once more at the end."""
        self._report = replace(self._report, num_committed_before=work.num_committed, num_stale=len(work.stale))
        self._refuse([*self._refused_rows(), *self._refusals], cache)
        self._refuse(work.refusals, cache)
        if work.num_refused_before:
            self._tally.refused[EARLIER] = work.num_refused_before
        if self._config.prune:
            from shared.cache.removal import remove_samples  # loads torch, as all that writes rows

            self._report = replace(self._report, num_removed=remove_samples(cache, work.stale))
        self._watch.log(
            Planned(
                num_shards=len(work.shards),
                num_samples=_num_samples(work),
                num_texts=work.shared_texts.num_members + work.texts.num_members,
                num_committed_before=work.num_committed,
                seconds=self._watch.progress.seconds["planning"],
            )
        )
        self._tell_room(work, cache)
        postponed = [] if pool is None else self._encode_work(pool, work, cache)
        if pool is not None and postponed and probes is not None and not self._watch.told_to_end:
            postponed = self._encode_postponed(pool, probes, cache, postponed)
        for sample in postponed:
            self._tally.leave(sample.reason, example=f"{sample.source}: {sample.detail}")
        write_card(cache)

    def _refused_rows(self) -> list[Refusal]:
        """Returns the rows of the manifest that cannot be used."""
        return [Refusal(source=row.source, reason=row.reason, detail=row.detail) for row in self._manifest.refused]

    def _refuse(self, refusals: Sequence[Refusal], cache: Cache) -> None:
        """Enters refusals into the ledger, some at a time: a manifest may have millions."""
        for start in range(0, len(refusals), _REFUSALS_AT_ONCE):
            some = refusals[start : start + _REFUSALS_AT_ONCE]
            write_ledger(cache.store, some)
            self._tally.refuse(some)

    def _plan(self, probes: Probes | None, cache: Cache, sources: Collection[str] | None = None) -> Work:
        with self._watch.progress.phase("planning", 0, "clip"):
            table = None if probes is None else probes.table_for(self._manifest)
            return find_work(self._config, self._manifest, table, cache, sources=sources)

    def _encode_work(self, pool: Pool, work: Work, cache: Cache) -> list[Postponed]:
        """Encodes what is to be encoded: texts that samples share first, since the others name them."""
        shared: SharedTexts | None = None
        text_ids = work.shared_texts.text_ids
        encode = partial(ShardPass, pool, cache, self._watch, self._tally)
        encode().run("texts", work.shared_texts, work.shared_texts.num_members, "text")
        if work.share_text:
            shared = cache.shared_texts(work.stream)
            if (shared.find(text_ids.numbers) < 0).any():
                self._tally.leave("texts that samples share are not encoded yet", _num_samples(work))
                return []
        encode(shared=shared).run("texts", work.texts, work.texts.num_members, "text")
        shards = encode(shared=shared, text_ids=text_ids)
        return shards.run("encoding", work.shards, _num_samples(work), "sample")

    def _encode_postponed(
        self, pool: Pool, probes: Probes, cache: Cache, postponed: Sequence[Postponed]
    ) -> list[Postponed]:
        """Tries samples again that could not be had; those of whose clips the probe is wrong are probed anew."""
        outdated = {sample.source for sample in postponed if sample.reason == OUTDATED}
        unknown: set[str] = set()
        if outdated:
            again = self._probe_all(probes, probes.again(self._manifest, outdated), pool)
            unknown = {clip.source for clip in again.postponed}
        if any(sample.reason != OUTDATED for sample in postponed):
            self._watch.pause(_LATER_SECONDS)
        if self._watch.told_to_end:
            return list(postponed)
        work = self._plan(probes, cache, {sample.source for sample in postponed} - unknown)
        self._refuse(work.refusals, cache)
        left = [sample for sample in postponed if sample.source in unknown]
        for sample in self._encode_work(pool, work, cache):
            if sample.reason == OUTDATED:  # it has other frames than even its newest probe says
                detail = sample.detail
                refusal = Refusal(source=sample.source, sample=sample.sample, reason="frames_missing", detail=detail)
                self._refuse([refusal], cache)
            else:
                left.append(sample)
        return left


def _num_samples(work: Work) -> int:
    return work.shards.num_samples if isinstance(work.shards, ShardTasks) else 0
