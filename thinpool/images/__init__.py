"""Container images: stacks of sealed layers, known by what they contain.

``images`` is the interface; ``importer`` takes images in, ``exporting`` gives them away, ``committing`` makes one of a container; ``archives``,
``archive_out`` and ``registry`` are where they come from and go to; ``store`` keeps what there is to know of them, ``blobs`` their archives.
"""
