"""Adapters (LoRA and its relatives): read, placed in a model's networks, applied completely or refused.

Floor 6. `formats.py` knows how files name their tensors, `deltas.py` what these make, `adapter_file.py` opens
one file, `names.py` and `plan.py` say where every change goes, `edits.py` and `side_branch.py` carry it out,
`adapters.py` is the set that one model has. Counterpart in the Rust worker: `lora.rs`.
"""
