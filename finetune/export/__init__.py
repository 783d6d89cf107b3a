"""Export targets of adapters: a folder for PEFT, a merged model, files for other engines.

A target is a file here with one frozen, keyword-only dataclass, whose fields are its options, and two methods
(``target.Target``):

- ``refuse(manifest)`` raises ExportError, with the reason and another way, if the target cannot hold the adapter. It
  runs before anything is loaded.
- ``make(source, folder)`` writes the files into ``folder``, which is empty, reads them back, and returns the
  comparisons. ``source`` holds the adapter's tensors, the plain base in fp32, which the target may change, and the
  outputs of base and adapter for the probe and some other rows. ``parity.compare`` compares outputs with those,
  ``parity.compare_tensors`` compares tensors.

One line in ``tables.EXPORT_TARGETS``, and for each option one in ``tables.EXPORT_OPTIONS`` and one in ``command``.
``exporting.export_adapter`` does the rest for all targets: it reads and checks the adapter, loads its base, makes the
folder appear complete or not at all, and writes the verdict beside the files.
"""
