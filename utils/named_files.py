"""Which image files --data_path, --eval_data_path, --train_list, --eval_list and --val_split name."""

import logging
import os

from .args import given
from .data.files import LISTS, ClassFolders, ImageFiles, ImageList, ImageTree, MultiLabelList
from .data.splits import parts, split_folders
from .data.tars import open_tar, tar_shards
from .errors import UsageError, refuse

log = logging.getLogger("fcmae")

FOLDERS = ("IMNET", "image_folder")


def data_path(args) -> str:
    refuse(not args.data_path, f"--data_set {args.data_set} needs --data_path; --data_set shapes needs no data")
    return args.data_path


def validation(args) -> str:
    """What tells the validation images: a flag, or the folder beside train/; '': nothing does."""
    flags = [name for name in ("eval_list", "eval_data_path") if getattr(args, name, None)]
    if flags or args.data_set not in FOLDERS:
        return f"--{flags[0]}" if flags else f"--data_set {args.data_set}"
    val = os.path.join(args.data_path or "", "val")
    if args.data_set == "IMNET" and (os.path.isdir(val) or not _listed(True, args)):
        return val
    return split_folders(args.data_path).get("val", "")


def unlabelled_files(args) -> ImageFiles:
    """The training files of --data_set IMNET or image_folder, without a transform; labels are not needed."""
    if not _share(args):
        return _open(True, args, labelled=False)
    try:
        return labelled_files(True, args)  # labels tell which are held out
    except UsageError as error:
        raise UsageError(f"--val_split {args.val_split}: needs labelled images; {error}") from error


def labelled_files(is_train: bool, args, classes: list[str] | None = None) -> ImageFiles:
    """The files of --data_set IMNET or image_folder, without a transform; `classes` as for `build_dataset`.

    Raises UsageError where --val_split is given beside other validation images, or one class alone is to be trained.
    """
    share = _share(args)
    of_training = is_train or bool(share)
    untold = not of_training and classes is None and args.data_path
    if untold and (_listed(True, args) or os.path.isdir(root := _class_root(True, args)[0]) or tar_shards(root)):
        classes = labelled_files(True, args).classes
    dataset = _open(of_training, args, classes)
    alone = of_training and len(dataset.classes) < 2 and not getattr(dataset, "several", False)
    refuse(alone, f"{dataset.source}: has one class alone, {dataset.classes[0]}; at least two are needed")
    if not share:
        return dataset
    split = parts(dataset, share, args.split_seed)
    if is_train or getattr(args, "eval", False):
        log.info("--val_split %s: of %d images, %d are held out", share, len(dataset), len(split[1]))
    was, now = getattr(args, "trained_images", None), len(split[0])
    if not is_train and was not in (None, now):
        log.warning(
            "--val_split %s: leaves %d images, %d were trained on: some held out may be of them", share, now, was
        )
    return split[not is_train]


def _share(args) -> float | None:
    """--val_split, of the flags or of a checkpoint, where nothing else tells the validation images."""
    share, known = getattr(args, "val_split", None), validation(args)
    instead = "leave one out; --data_set image_folder --data_path FOLDER/train splits that alone"
    told = f"--val_split {share}: {known} tells the validation images already; {instead}"
    refuse(share and known and "val_split" in given(args), told)
    return None if known else share


def _open(is_train: bool, args, classes: list[str] | None = None, labelled: bool = True) -> ImageFiles:
    nb_classes = getattr(args, "nb_classes", None)
    several = labelled and getattr(args, "multi_label", None)
    if listed := _listed(is_train, args):
        of_labels = (classes or []) if labelled else None, args.in_chans, nb_classes
        return (MultiLabelList if several else ImageList)(*listed, *of_labels)
    root, flag = _class_root(is_train, args)
    whose = "" if "multi_label" in given(args) else " (of the checkpoint)"
    refuse(several, f"--multi_label true{whose}: {flag} {root} is no list, which tells several labels of an image")
    if tar_shards(root):
        return open_tar(root, flag, args.in_chans, classes, labelled, nb_classes)
    if labelled:
        return ClassFolders(root, flag, classes, args.in_chans)
    if args.data_set == "IMNET" and not os.path.isdir(root):
        instead = "for any folder of images give --data_set image_folder"
        raise UsageError(f"{flag} {args.data_path}: has no folder 'train'; {instead}")
    return ImageTree(root, flag, args.in_chans)


def _is_list(path: str | None) -> bool:
    return (path or "").lower().endswith(LISTS) and not os.path.isdir(path)


def _listed(is_train: bool, args) -> tuple[str, str, str | None] | None:
    """The file that lists the images, the flag that names it, and the folder that its paths are relative to."""
    file, flag = (args.train_list, "--train_list") if is_train else (args.eval_list, "--eval_list")
    own, own_flag = (args.data_path, "--data_path") if is_train else (args.eval_data_path, "--eval_data_path")
    root = own or args.data_path
    folder = os.path.dirname(root) if _is_list(root) else root
    if file:
        return file, flag, folder
    return (own, own_flag, folder) if _is_list(own) else None


def _class_root(is_train: bool, args) -> tuple[str, str]:
    """The folder of class folders, and the flag that names it."""
    own = not is_train and args.eval_data_path
    flag, root = ("--eval_data_path", own) if own else ("--data_path", data_path(args))
    split = "train" if is_train else "val"
    if args.data_set == "IMNET" and not _is_list(root):
        return root if own else os.path.join(root, split), flag
    if found := split_folders(root).get(split):
        log.info("%s %s: holds a folder for each split; %s is read", flag, root, found)
    untold = "--data_set image_folder evaluates on --eval_data_path: give it, --val_split 0.1, or --disable_eval true"
    refuse(not (found or is_train or own), untold)
    return found or root, flag
