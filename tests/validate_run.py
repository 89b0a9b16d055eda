"""Validate the last checkpoint of a run in several processes: ``python validate_run.py RUN PROCESSES OUTPUT``; rank 0 writes the scores."""

import json
import sys
from pathlib import Path

import lightning as L

from densecal.data import SegmentationData
from densecal.inference import Predictor
from densecal.losses import SVLSLoss
from densecal.tasks import SegmentationTask

if __name__ == "__main__":
    run, processes, output = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    predictor = Predictor.from_run(run, "last")
    task = SegmentationTask(predictor.model, SVLSLoss(), predictor.card.schema, predictor.window)
    data = SegmentationData(predictor.card, check=False, progress=False)
    trainer = L.Trainer(accelerator="cpu", devices=processes, strategy="ddp", use_distributed_sampler=False, logger=False, enable_progress_bar=False)
    (scores,) = trainer.validate(task, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        output.write_text(json.dumps(scores))
