complete -c gpt-oss-qat -e
complete -c launch -e
functions -e _gpt_oss_qat_complete
function _gpt_oss_qat_is_module; return 1; end
