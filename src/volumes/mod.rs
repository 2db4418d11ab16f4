//! What it means for a volume to be published.
