"""What compressors around other compressors need."""
